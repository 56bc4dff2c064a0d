"""Rules of when two answers are the same: numbers with words, choices, exact constants, sets,
clauses, congruences, cases, integer variables, names, several boxes."""

import json

import pytest
from grading_cases import CASES, boxed, load

from effreason.grading.grader import Grader


@pytest.fixture(scope="module")
def grader():
    with Grader(step_budget_seconds=300) as grader:
        yield grader


# (response or answer, reference): the same, in the order of docs/grading.md.
SAME = [
    (r"\text{three dozen}", "36"), (r"4 \text{ dozen eggs}", "48"), (r"\text{half a dozen}", "6"),
    (r"2.5 \text{ lakh}", "250000"), (r"3 \text{ crore}", "30000000"), ("5 mln", "5000000"),
    ("2 bn", "2000000000"), (r"\text{two and a half}", "2.5"), (r"7 \text{ halves}", "3.5"),
    (r"3 \text{ quarters}", "0.75"), (r"\text{three quarters}", "3/4"),
    (r"\text{negative } 5", "-5"), (r"\text{negative seven}", "-7"),
    (r"\text{minus } \frac{1}{2}", "-1/2"), (r"9 \text{ tenths}", "0.9"),
    (r"\text{one hundred and twenty}", "120"), (r"\text{five sixths}", "5/6"),
    ("6'2\"", "6 ft 2 in"), (r"6\text{ feet }2\text{ inches}", "6'2\""),
    (r"2\text{ hrs }15\text{ mins}", "2 hours 15 minutes"),
    (r"2\text{ h } 15\text{ min}", r"2\text{ hours and }15\text{ minutes}"),
    (r"5.2\ \text{Å}", "5.2"), (r"5.2\,\text{\AA}", "5.2"),
    (r"\text{There are } 12 \text{ students}", "12"), (r"\text{The total cost is } \$45", "45"),
    (r"\text{She has } 7 \text{ apples left}", "7"), (r"\text{It takes } 3 \text{ hours}", "3"),
    (r"20\% \text{ decrease}", "20"), (r"15\% off", "15"), (r"8 \text{ apples per basket}", "8"),
    (r"25 \text{ students in total}", "25"), (r"\text{approximately } 12", "12"),
    (r"\text{Page } 45", "45"), (r"\text{Day } 5", "5"), (r"\text{Team } 7", "7"), ("15кг", "15"),
    (r"15\text{ руб}", "15"), ("20米", "20"), (r"20\text{平方厘米}", "20"), ("15円", "15"),
    ("100원", "100"), (r"\text{答：}7", "7"), ("答：7", "7"), (r"\text{Ответ: }7", "7"),
    ("Antwort: 7", "7"), ("x=2或x=5", "2,5"), (r"x=2\text{ или }x=5", "2,5"),
    (r"1\text{ und }2", "1,2"), (r"1\text{ y }2", "1,2"), ("٥", "5"), (r"3 \text{ ft}^2", "3"),
    (r"\frac{60\text{ miles}}{\text{hour}}", "60"), (r"50\frac{\text{km}}{\text{h}}", "50"),
    (r"4\text{ cups of flour}", "4"), ("12 slices", "12"), (r"\text{\$}3.50", "3.5"),
    ("$4.50 per hour", "4.5"), ("Ｂ", "B"), ("（B）", "B"), (r"\text{(C) }", "C"),
    (r"\textbf{(A)}\ 12", "12"), (r"\text{(D)}~\frac{3}{4}", r"\frac34"), ("(E) 42", "42"),
    ("B) 7", "7"), (r"\boxed{\text{C}}", "C"), (r"\text{Choice D}", "D"),
    (r"\text{The answer is (D)}", "D"), (r"(C)\ 12", "C"), ("2019!", r"2019\cdot 2018!"),
    (r"\binom{200}{100}", r"\binom{200}{99}\cdot\frac{101}{100}"), (r"e^{200}\cdot e", "e^{201}"),
    ("10^{4000}", "100^{2000}"), (r"\sqrt{10^{100}}", "10^{50}"),
    (r"\frac{2025!-2024!}{2024!}", "2024"), (r"\sqrt[3]{2+\sqrt5}+\sqrt[3]{2-\sqrt5}", "1"),
    (r"\cos 36^\circ", r"\frac{1+\sqrt5}{4}"), (r"1.5\sqrt{2}", r"\frac{3\sqrt2}{2}"),
    ("0.125x", "x/8"), (r"\lfloor\frac{n+1}{2}\rfloor", r"\lceil\frac{n}{2}\rceil"),
    (r"\frac{1-(-1)^n}{2}", r"\frac{1+(-1)^{n+1}}{2}"), (r"\cos(n\pi)", "(-1)^n"),
    ("(-1)^{2n}", "1"), (r"\lfloor x\rfloor+1", r"\lfloor x+1\rfloor"),
    (r"\frac{n^2}{4}-\frac{1-(-1)^n}{8}", r"\lfloor\frac{n^2}{4}\rfloor"),
    (r"x \neq -1", r"(-\infty,-1)\cup(-1,\infty)"), ("|x|<3", "(-3,3)"), (r"|x-1|\le 2", "[-1,3]"),
    (r"|x|\geq 2", r"(-\infty,-2]\cup[2,\infty)"), (r"x>1 \text{ and } x<4", "1<x<4"),
    (r"x\le 0 \text{ or } x\ge 4", r"(-\infty,0]\cup[4,\infty)"),
    (r"\mathbb{R}\setminus\{0,1\}", r"(-\infty,0)\cup(0,1)\cup(1,\infty)"),
    (r"x\ne 0, 1", r"\mathbb{R}\setminus\{0,1\}"),
    (r"x \neq 2 \text{ and } x\neq 3", r"\mathbb{R}\setminus\{2,3\}"),
    (r"\{x \mid x \neq 2\}", r"\mathbb{R}\setminus\{2\}"),
    (r"x=0 \text{ or } 1\le x<2", r"\{0\}\cup[1,2)"), (r"(-\infty,2)\cap(0,\infty)", "(0,2)"),
    (r"\text{all real numbers except } 0 ", r"x\neq 0"), (r"[\sqrt{8},3]", r"[2\sqrt2,3]"),
    (r"x>\sqrt{8}", r"(2\sqrt2,\infty)"), ("x<1, x>3", r"(-\infty,1)\cup(3,\infty)"),
    ("x>1, x<3", "(1,3)"), (r"x \not\in \{1\}", r"x\notin\{1\}"), ("x^2<4", "(-2,2)"),
    (r"f(x) = x + c, c \in \mathbb{R}", "f(x)=x+c"),
    (r"\frac{\pi}{3}+2k\pi\ (k\in\mathbb{Z})", r"\frac{\pi}{3}+2k\pi"),
    (r"x=k\pi, k\in Z", r"k\pi"), (r"x = n\pi \text{ where } n \text{ is an integer}", r"n\pi"),
    (r"f(x)=2x \text{ for all } x", "f(x)=2x"),
    (r"f(x)=2x \text{ for all real } x \in \mathbb{R}", "2x"), (r"a_n=3n+1 (n\ge 1)", "3n+1"),
    (r"a_n = 3n+1, n=1,2,3,\ldots", "3n+1"),
    (r"a_n=2n-1\ (n\in\mathbb{N}_+)", r"a_n=2n-1, n\in\mathbb{N}^*"),
    (r"f(n)=n+1 \text{ for any integer } n", "n+1"),
    (r"x=\frac{k\pi}{2}, k \text{ is an integer}", r"\frac{k\pi}{2}"),
    (r"x\equiv 2 \pmod{5}", r"x \equiv 2 \bmod 5"),
    (r"n\equiv 1 (\text{mod } 4)", r"n\equiv 1 \pmod 4"),
    (r"n \equiv -1 \pmod 4", r"n\equiv 3\pmod{4}"),
    (r"n \equiv 0,1 \pmod 3", r"n\equiv 1, 0\pmod 3"),
    (r"n \equiv 0 \text{ or } 1 \pmod 3", r"n\equiv 0,1\pmod 3"),
    (r"n\equiv 7 \mod 5", r"n\equiv 2\pmod 5"), (r"\text{Monday.}", "Monday"),
    (r"\text{south-west}", "southwest"), (r"\text{No, it is impossible}", "No"),
    (r"\text{Yes, because it converges}", "Yes"), (r"\text{True, since } n>0", "True"),
    (r"\text{none}", r"\text{no solution}"), (r"\text{No solutions.}", r"\emptyset"),
    ("Isosceles Triangle.", r"\text{isosceles triangle}"), (r"\min\{x,y\}", r"\min(x,y)"),
    (r"\max(a,b)", r"\max\{b,a\}"), (r"\text{max}(a,b)", r"\max(a,b)"),
    (r"\gcd\{m,n\}", r"\gcd(m,n)"), (r"\max\left\{a,b\right\}", r"\max(a,b)"),
    (r"\begin{cases} 1 & x>0 \\ 0 & x\le 0\end{cases}",
     r"\begin{cases} 0, & \text{if } x \leq 0 \\ 1, & \text{if } x>0 \end{cases}"),

    (r"f(x)=\begin{cases} x^2 & \text{if } x\ge 1 \\ 2x-1 & \text{otherwise}\end{cases}",
     r"\begin{cases} x^2, & x\ge 1 \\ 2x-1, & x<1\end{cases}"),

    (r"\begin{cases} n/2 & \text{if } n \text{ is even}\\ n & \text{if } n \text{ odd}\end{cases}",
     r"\begin{cases}\frac{n}{2}, & n \text{ even} \\ n, & n\text{ odd}\end{cases}"),
    (r"\boxed{3} and \boxed{7}", "3,7"), (r"$x=\boxed{2}$", "2"), (r"the answer is \boxed 7", "7"),
    (r"$\boxed\frac{3}{4}$", "3/4"), (r"$\boxed\pi$", r"\pi"),
    (r"3\mathbf{i}+4\mathbf{j}-\mathbf{k}", "(3,4,-1)"),
    (r"2\hat{i}-\hat{k}", r"\begin{pmatrix}2\\0\\-1\end{pmatrix}"),
    (r"\mathbf{i}+\mathbf{j}", r"\langle 1,1\rangle"), (r"-\vec{i}+5\vec{j}", "(-1,5)"),
    (r"1,\!000,\!000", "1000000"), (r"12,\! 345", "12345"), ("10{:}30", "10:30"),
    (r"\text{5:15 p.m.}", "5:15 PM"), (r"\text{5:15 PM}", r"5{:}15\text{ p.m.}"),
    (r"\begin{bmatrix}1 & 2 \\[6pt] 3 & 4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\begin{pmatrix}1 \cr -1\end{pmatrix}", "(1,-1)"), (r"\sqrt{9 m_1^2 g}", r"3m_1\sqrt{g}"),
    (r"R\sqrt{2}", r"\sqrt{2R^2}"), (r"\omega r", r"\sqrt{\omega^2 r^2}"),
    (r"\gamma_1 + \gamma_2", r"\gamma_2+\gamma_1"), (r"\Gamma_0 E_1", r"E_1\Gamma_0"),
    (r"\frac{e_1}{2}", r"\frac12 e_1"), ("I_0 e^{-t}", "e^{-t}I_0"), ("E[X]=5", "5"),
    (r"\text{Var}(X)=2", "2"), ("(x,y)=(1,2)", "(1,2)"), ("(m,b)=(2,1)", "(2,1)"),
    (r"\{a=1,b=2\}", "(1,2)"), (r"\{2,2,3\}", r"\{2,3\}"),
    (r"\text{cost}=\text{price}", r"\text{price}=\text{cost}"), ("1011", "1011_2"),
    ("3A", "3A_{16}"), (r"1+3+5+\dots+19=100", "100"), (r"3.14159265\ldots", r"\pi"),
    (r"1.41421356\dots", r"\sqrt2"), ("{}^6C_2", "15"), ("C(6,2)", "15"), ("_6C_2", "15"),
    (r"\text{Year 2005}", "2005"), (r"\text{about } 3 \text{ hours}", "3"),
    (r"3.5\times 10^{6}\text{ J}", "3500000"), (r"2\text{ m/s}", "2"), ("12 % ", "12"),
    (r"(x-3)(x+2)\text{ for all }x", "x^2-x-6"), (r"n^2 \text{ for } n\ge 1", "n^2"),
    (r"\sin(n\pi)", "0"), (r"[1,3]\cup[2,4]", "[1,4]"), (r"\cos(2\pi n)", "1"), ("k^2", "(k)^2"),
    (r"\text{seven-eighths}", "7/8"), (r"\text{two thirds of the area}", "2/3"),
    (r"\sqrt{4\pi^2 r^2}", r"2\pi r"), (r"5\text{ and }6\text{ cm}", "5,6"),
    (r"3 \text{ km } 200\text{ m}", r"3\text{ kilometers }200\text{ meters}"),
    (r"30^\circ 15'", r"30^\circ 15'"),
    (r"4\text{ lb }3\text{ oz}", r"4\text{ pounds }3\text{ ounces}"), (r"x = 5 \text{ units}", "5"),
    (r"1.5 \text{ million people}", "1500000"), (r"12 \text{ approximately}", "12"),
    ("n^{2}-1", "n^2-1"), (r"\begin{cases}x=1\\y=2\end{cases}", "(1,2)"),
    (r"\text{(B)}\ \frac{1}{2}", r"\frac12"), ("20 percent", r"20\%"), (r"\$5", "5 cents"),
]

# Not the same.
DIFFERENT = [
    (r"5 \text{ score}", "5"), (r"5\text{ hundredths}", "5"), (r"5\text{ trillionths}", "5"),
    (r"5\text{ or }6\text{ apples}", "5"), (r"5 \text{ or seven}", "5"), (r"5 \text{ mln}", "5"),
    ("5万", "5"), ("5千", "5"), ("5 млн", "5"), (r"5\text{ тысяч}", "5"),
    (r"5\text{ to the power of three}", "5"), (r"5\text{ times ten}", "5"),
    (r"5 \text{ does not work}", "5"), (r"5\text{ (incorrect)}", "5"), (r"\text{not } 5", "5"),
    (r"\text{less than } 5", "5"), (r"\text{at least } 5 \text{ apples}", "5"),
    (r"\text{more than } 5", "5"), (r"\text{half of } 10", "10"), (r"\text{twice } 5", "5"),
    (r"\text{the square of } 5", "5"), (r"\text{the square root of } 5", "5"),
    (r"\text{the reciprocal of } 5", "5"), (r"\text{it is never } 5", "5"),
    (r"\text{between } 5 \text{ and } 6", "5"), (r"\text{negative } 5", "5"),
    (r"\text{minus } 5", "5"), (r"\text{two dozen}", "2"), (r"\text{three halves}", "3"),
    (r"5\text{ and a half}", "5"), ("5'6\"", "5'7\""), ("5'6\"", "5.5"),
    (r"1\text{ hour }30\text{ minutes}", "1"), (r"1\text{ hour }30\text{ minutes}", "130"),
    (r"1\text{ hour }30\text{ minutes}", r"1\text{ hour }30\text{ seconds}"),
    (r"2\text{ h }5\text{ min}", r"5\text{ h }2\text{ min}"), ("5 km", "5 m"), ("5 kg", "5 g"),
    ("60 mph", "60 km/h"), (r"5\text{ BC}", "5"), ("5不", "5"), ("不是5", "5"), ("一半5", "5"),
    ("大于5", "5"), (r"5\text{ unless } n=1", "5"), (r"5 \text{ if } n \text{ is even}", "5"),
    (r"5\text{ mod }7", "5"), (r"5 \text{ more than } x", "5"), (r"5\text{ remainder } 2", "5"),
    (r"5\text{ cubed}", "5"), (r"5\text{ nor }6", "5"), (r"5 \text{ point two}", "5"),
    (r"5\text{ plus two}", "5"), (r"\text{four score and seven}", "4"), ("(A)(B)(C)", "A"),
    ("AB", "A"), ("A,C", "A"), (r"\text{(A) and (C)}", "A"), (r"\text{A or C}", "A"),
    ("(A) 12", "13"), ("(A) 12", "A2"), ("A: B", "A"), ("(C), not (B)", "B"), ("Ｃ", "B"),
    (r"\text{not B}", "B"), (r"(B) \text{ is incorrect}", "B"), (r"\text{neither A nor B}", "A"),
    ("A and B", "B"), ("(A) (12)", "13"), ("CAB", "ABC"), ("PQR", "RQP"), ("BAC", "ABC"),
    ("TTH", "HTT"), (r"\text{AB}", "BA"), ("2020!+1", "2020!"), (r"\frac{1}{2000!}", "0"),
    ("e^{-200}", "0"), (r"\pi+10^{-100}", r"\pi"), ("1+e^{-150}", "1"),
    (r"\sqrt{10^{200}+1}", "10^{100}"), ("2^{500}-1", "2^{500}"), (r"\tan(10^{-60})", "10^{-60}"),
    (r"\binom{300}{150}+1", r"\binom{300}{150}"), (r"\frac{100!+1}{100!}", "1"),
    (r"(2+\sqrt3)^{100}", r"(2+\sqrt3)^{100}+(2-\sqrt3)^{100}"), (r"\log_{10}(10^{50}+1)", "50"),
    (r"\sqrt2\cdot 1.0000001", r"\sqrt2"), ("1.0000001x", "x"), ("3.1415926 r^2", r"\pi r^2"),
    ("0.3333333x", "x/3"), ("0.9999999", "1"), (r"1.00000001\pi", r"\pi"), ("x+10^{-60}", "x"),
    (r"\lfloor n/3\rfloor", r"\lceil n/3\rceil"), (r"\lfloor n/2 \rfloor", "n/2"), ("(-1)^n", "1"),
    ("(-1)^n", "(-1)^{n+1}"), (r"\lceil x\rceil", r"\lfloor x\rfloor+1"), (r"\cos(n\pi)", "1"),
    (r"\sin(x\pi)", "0"), ("(-2)^n", "2^n"), (r"\lfloor x \rfloor", "x"),
    (r"\lfloor n/2\rfloor+\lfloor n/3\rfloor", r"\lfloor 5n/6\rfloor"),
    (r"x>1 \text{ or } x<4", "1<x<4"), (r"x<0 \text{ and } x>4", r"(-\infty,0)\cup(4,\infty)"),
    (r"x\ne 2", r"(2,\infty)"), ("|x|<3", "[-3,3]"), ("|x|<3", r"(-\infty,3)"), ("|x|>2", "(-2,2)"),
    (r"x\ne 0", r"x\ne 1"), (r"\mathbb{R}\setminus\{0\}", r"\mathbb{R}"),
    (r"(0,1)\cap(2,3)", r"(0,1)\cup(2,3)"), (r"[1,2]\cup\{3\}", "[1,3]"),
    (r"x=1 \text{ or } x>2", r"[1,\infty)"), (r"\text{all real numbers except }2", r"\mathbb{R}"),
    (r"x\ne 1,2", r"x\ne 1"), ("x>2", "2"), (r"x \geq 2", "x>2"), ("1<x<4", "1<y<4"),
    ("f(x+1)", "xf+f"), ("f(x)", "fx"), ("g(2x)", "2gx"), ("f(x)+1", "f(x+1)"),
    ("(y,x)=(2,1)", "(2,1)"), ("(b,a)=(3,4)", "(3,4)"), ("x=2,y=1", "(1,2)"),
    (r"\{y=1,x=2\}", "(1,2)"), ("(x,y)=(1,2)", "(2,1)"), (r"\{\emptyset\}", r"\emptyset"),
    (r"\{\}", r"\{\emptyset\}"), (r"\{\{1\}\}", r"\{\{2\}\}"), (r"\{1,2\}", r"\{1,2,3\}"),
    ("1,1,2", "1,2"), (r"2k\pi, k\in\mathbb{N}", r"2k\pi, k\in\mathbb{Z}"),
    (r"k\pi, k\in\mathbb{Z}", r"2k\pi, k\in\mathbb{Z}"), (r"f(x)=cx \text{ for } c=2", "f(x)=cx"),
    (r"x=1, n\ge 1 \text{ or } x=2", "1"), (r"5 \text{ where } 5=6", "5"),
    (r"f(x)=x \text{ for all } x \text{ except } 0", "2x"), (r"x=3, y\ge 2", "3"),
    (r"n\equiv 1\pmod 4", r"n\equiv 3\pmod 4"), (r"n\equiv 1\pmod 4", r"n\equiv 1\pmod 8"),
    (r"n\equiv 0,1\pmod 4", r"n\equiv 0\pmod 4"), (r"n\equiv 1\pmod 4", "1"),
    (r"x\equiv 1 \pmod 4", r"n\equiv 1 \pmod 4"), (r"\text{Yes, but no}", "Yes"),
    (r"\text{Yes or no}", "Yes"), (r"\text{No, it is possible; yes}", "No"),
    (r"\text{Tuesday}", "Thursday"), (r"\text{north}", "northeast"), (r"\text{None}", "0"),
    (r"\text{true or false}", "true"), (r"\text{No}", r"\text{No solution}"),
    (r"\max(a,b)", r"\min(a,b)"), (r"\max(a,b)", "(a,b)"), (r"\max\{a,b\}", r"\{a,b\}"),
    (r"\max(a,b)", "a"),
    (r"\begin{cases} x & x\ge 0\\ -x & x<0\end{cases}",
     r"\begin{cases} -x & x\ge 0\\ x & x<0\end{cases}"),

    (r"\begin{cases} x & x> 0\\ -x & x\le0\end{cases}",
     r"\begin{cases} x+1 & x>0\\ -x & x\le0\end{cases}"),

    (r"\begin{cases} x & x\ge 1\\ -x & x<1\end{cases}",
     r"\begin{cases} x & x\ge 0\\ -x & x<0\end{cases}"),
    (r"\boxed{3}, \boxed{5}", "5"), (r"\boxed{3} or \boxed{5}", "5"),
    (r"\boxed{3}, \boxed{5}, \boxed{7}", "3,5"), (r"maybe \boxed{5}, so \boxed{6}", "5"),
    (r"\boxed{\sqrt{3}} which is \boxed{\approx 1.414}", r"\sqrt2"),
    (r"\mathbf{i}-2\mathbf{j}", "(-2,1)"), (r"\mathbf{i}-2\mathbf{k}", "(1,-2)"),
    (r"3\mathbf{i}", "(0,3)"), (r"1,\! 234", "1235"), ("10{:}30", "10:31"),
    (r"3{:}45\text{ PM}", r"3{:}45\text{ AM}"), ("3,4", "34"), ("1, 234", "1234"),
    (r"\begin{pmatrix}1\\[4pt]2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\sqrt{x^2}", "x"), (r"\sqrt{a^2}", "a"), (r"-R\sqrt2", r"\sqrt{2R^2}"),
    ("E_1 E_2", "E_1 E_3"), (r"\gamma_1", r"\Gamma_1"), ("e_1", "E_1"), (r"\gamma", r"\Gamma"),
    ("E_0", "e"), ("I_0", "i"), ("2516_8", "2516"), ("11", "101_2"), ("5", "101_2"),
    (r"1+2+\dots+10=56", "55"), (r"\dots=55", "54"), (r"3.14\dots", r"\pi"), (r"2.718\dots", "e"),
    ("C(5,2)", "20"), ("P(5,2)", "10"), (r"\text{Year } 1998", "1999"),
    (r"\text{Year } 1998", "98"), (r"\text{Room } 12 \text{ or } 13", "12"),
    (r"10\% \text{ of } 50", "10"), (r"10\% \text{ of } 50", "50"),
    (r"\text{Janet makes } 18 \text{ or } 20", "18"), ("5 a.m.", "5"), (r"12\frac{a}{b}", "12"),
    (r"3\frac{x}{y}", "3"), (r"5\text{ ft }6\text{ in}", "5"), ("5 % 6", "5"), ("5 % 6", "56"),
    (r"12 \text{ cm or less}", "12"), ("|m|", "m"), ("|n|", "n"), (r"\sqrt{n^2}", "n"),
    ("|r|", "r"), (r"\text{sine of } 30", "30"), (r"x^2 \text{ for } x>0", "x^2"),
    (r"n^2 \text{ for } n\le 5", "n^2"), (r"x^2, x\ge 0", "x^2+1"), (r"[1,3]\cup[2,4]", "[2,3]"),
    (r"\text{one-to-one}", "1"), (r"\frac{n(n+1)}{2}+1", r"\frac{n(n+1)}{2}"),
    ("-r", r"\sqrt{r^2}"), (r"n\text{ is even}", "n"), (r"5 \text{ to } 6", "5"),
    (r"\text{Set } A", "A"), (r"5 \text{ apples and } 6 \text{ pears}", "5"),
    (r"12 \text{ (in millions)}", "12"), (r"\text{12 or 13}", "12"),
    (r"a\equiv 5 \pmod{12}", r"5 \pmod{12}"), (r"\text{B}", "b"), (r"20 \text{ cm}", r"20\%"),
    (r"5^\circ", r"5\text{ cm}"),
]


def mistaken(grader, pairs, right):
    """Returns the pairs whose verdict is not `right`."""
    grades = grader.grade([answer if "boxed" in answer else boxed(answer) for answer, _ in pairs],
                          [reference for _, reference in pairs])
    assert [grade.reason for grade in grades if grade.status == "error"] == []
    return [pair for pair, grade in zip(pairs, grades, strict=True) if grade.correct != right]


def test_same(grader):
    assert mistaken(grader, SAME, True) == []


def test_different(grader):
    assert mistaken(grader, DIFFERENT, False) == []


def test_pairs_written_afresh(grader):
    rows = load("pairs2.jsonl")
    grades = grader.grade([row["response"] for row in rows], [row["gold"] for row in rows])
    assert [row for row, grade in zip(rows, grades, strict=True)
            if grade.correct != row["label"]] == []


def test_cases_from_bug_reports(grader):
    path = CASES.parent / "cases" / "cases.jsonl"
    if not path.is_file():
        pytest.skip(f"the cases are not here: {path}")
    rows = [row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
            if row["kind"] == "grading"]
    grades = grader.grade([row["input"]["response"] for row in rows],
                          [row["input"]["gold"] for row in rows])
    assert [row["id"] for row, grade in zip(rows, grades, strict=True)
            if grade.correct != (row["right"] == "correct")] == []
