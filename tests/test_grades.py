"""Grading: what counts as the answer, when two answers are the same, and that no answer can hurt the trainer."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effreason.grades import Grade, Grader, extract_answer
from effreason.grading import notation, pool, rationals, symbolic
from effreason.grading.exact import exact

REPOSITORY = Path(__file__).parents[1]
CASES = REPOSITORY.parent / "shared" / "grader"

# (answer, reference): the same, written differently.
EQUAL = [
    ("2 1/2", "2.5"), ("2 1/2", r"\frac{5}{2}"), (r"1\,000", "1000"), ("½", "0.5"), ("√2", r"\sqrt{2}"), ("x²", "x^2"),
    ("∞", r"\infty"), ("90°", "90"), ("e^{iπ}", "-1"), ("1+2i", "i(2-i)"), ("3√5", r"3\sqrt5"), ("2½", "2.5"),
    ("x = 5", "5"), ("5", "x=5"), ("f(x)=x^2+1", "x^2+1"), ("y=2x+1", "2x+1"), ("10/2=5", "5"), ("x=10/2=5", "5"),
    ("{1, 2, 3}", r"\{1,2,3\}"), ("{3,2,1}", r"\{1,2,3\}"), (r"\left\{1,2\right\}", "{1,2}"), ("0.333333", "1/3"),
    (r"33\frac{1}{3}\%", r"33\frac13"), ("5 million", "5000000"), (r"5\text{ million}", "5{,}000{,}000"),
    (r"\$5.50", "5.5"), ("5 dollars", r"\$5"), ("5 feet", "5"), ("5 ft", "5"), ("60 mph", "60"),
    (r"60\text{ km/h}", "60"), (r"9.8\,\text{m/s}^2", "9.8"), (r"9.8\ \mathrm{m/s^2}", "9.8"),
    ("12 square meters", "12"), ("12 cm^2", "12"), ("12 cm²", "12"), (r"12\pi\text{ cm}^2", r"12\pi"),
    (r"12\pi cm^2", r"12 \pi"), (r"\sin 30^\circ", r"\frac12"), (r"\tan 60^\circ", r"\sqrt3"),
    (r"\frac{\pi}{4}", r"\pi/4"), (r"\dfrac{3\sqrt{3}}{4}", r"\frac{3}{4}\sqrt{3}"), (r"\log_2 8", "3"),
    (r"\log_{2}8", "3"), (r"\ln e^2", "2"), ("2^{10}", "1024"), (r"\binom{5}{2}", "10"), ("5!", "120"),
    (r"\frac{10!}{8!}", "90"), ("(1,2)", r"\left(1,2\right)"), ("(1, 2, 3)", "(1,2,3)"), ("1,2", "(1,2)"),
    ("[1,2]", "[1, 2]"), (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"),
    ("x<2 or x>3", r"(-\infty,2)\cup(3,\infty)"), (r"1 < x \leq 5", "(1,5]"), ("x>=2", r"[2,\infty)"),
    (r"x \in [2,3]", "[2,3]"), (r"2\le x\le 3", r"x\in[2,3]"), ("(A)", "A"), ("A", "(A)"), (r"\textbf{(B)}", "B"),
    ("B) 12", "B"), (r"\text{B}", "B"), ("B: foo", "B"), ("Option B", "B"), ("yes", "Yes"), (r"\text{Yes}", "yes"),
    ("No solution", r"\text{no solution}"), (r"\emptyset", r"\text{no solution}"), ("Monday", r"\text{Monday}"),
    ("east.", "east"), (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}"),
    (r"\begin{pmatrix}1/2\\0.5\end{pmatrix}", r"\begin{pmatrix}0.5\\\frac12\end{pmatrix}"),
    ("x^2+y^2=4", "y^2+x^2-4=0"), ("2x+4y=6", "x+2y=3"), ("y=x+1", "y-x=1"), ("x=1, y=2", "(1,2)"),
    ("x=1,y=2", "y=2,x=1"), ("x=1 and x=2", "1,2"), ("1 or 2", "1,2"), (r"\pm 3", "3,-3"), (r"x=\pm 3", "-3, 3"),
    (r"1\pm\sqrt2", r"1+\sqrt2,1-\sqrt2"), (r"\frac{x+1}{x-1}", "(x+1)/(x-1)"), ("2*x**2", "2x^2"), ("exp(x)", "e^x"),
    ("sqrt(2)/2", r"\frac{1}{\sqrt2}"), (r"\sqrt[3]{2}", "2^{1/3}"), ("2^(1/3)", r"\sqrt[3]2"),
    (r"\cos^2 x+\sin^2 x", "1"), ("(x+1)^2", "x^2+2x+1"), ("-x+1", "1-x"), ("a(b+c)", "ab+ac"), ("ba", "ab"),
    (r"6.02\times10^{23}", "6.02e23"), ("1e-3", "0.001"), (r"0.1\overline{6}", "1/6"), ("+7", "7"), ("7.0", "7"),
    ("7.", "7"), ("$7$", "7"), (r"\(7\)", "7"), (r"\$7", "7"), (r"7\%", "7"), ("7 percent", "7"), ("7%", r"7\%"),
    ("1:2", "1:2"), ("3:00 PM", r"3:00\text{ p.m.}"), ("27_{10}", "27"), ("101_2", "101_{2}"),
    (r"101_{\text{two}}", "101_2"), ("**5**", "5"), (r"\text{5 cm}", "5"), ("５", "5"), ("−3", "-3"),
    ("x≤5", r"x\leq 5"), ("x ≥ 2", r"x \ge 2"), ("3 × 4", "12"), ("8 ÷ 2", "4"), (r"\lfloor 2.5 \rfloor", "2"),
    ("|−3|", "3"), ("|x|", r"\left|x\right|"), (r"\infty", "infinity"), (r"+\infty", r"\infty"), ("π", "3.14159265"),
    ("n(n+1)/2", r"\frac{n^2+n}{2}"), (r"\sum_{k=1}^{3} k", "6"), (r"\frac{d}{dx}x^2", "2x"), ("x/2", r"\frac{1}{2}x"),
    (r"\sqrt{50}", r"5\sqrt2"), (r"16\sqrt{3}/3", r"\frac{16}{\sqrt{3}}"), (r"\frac{-1}{2}", r"-\frac12"),
    ("1,000,000", "10^6"), (r"4 \text{ or } 5", "5,4"), ("2i", "0+2i"), ("(2+i)(2-i)", "5"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"), (r"\ln(xy)", r"\ln x+\ln y"), ("C = 5", "5"),
    (r"\angle ABC = 30^\circ", "30"), (r"10\sqrt2 \approx 14.14", r"10\sqrt2"), (r"\text{Area} = 25\pi", r"25\pi"),
    (r"\mathbf{42}", "42"), ("Evelyn", r"\text{Evelyn}"), ("(-1)^{n+1}", "-(-1)^n"), ("2^{2x}", "4^x"),
    (r"\sqrt{x^2}", "|x|"), ("x^{-1}", r"\frac1x"), (r"\frac{1}{2}\ln 2", r"\ln\sqrt{2}"),
    (r"\left(\frac{1}{2},\frac{\sqrt3}{2}\right)", r"(0.5,\frac{1}{2}\sqrt{3})"), ("h(x) = (x+1)^2", "h(x)=x^2+2x+1"),
    (r"4\text{ hours and }30\text{ minutes}", r"4\text{ hours and }30\text{ minutes}"), ("64.0 degrees", r"64^\circ"),
    (r"1\frac{1}{2}\text{ hours}", "1.5"), (r"\frac{3}{4} cup", "3/4"), ("500 mL", "500"), ("20 years old", "20"),
    ("36 inches", "36"), (r"\text{(-1, 2)}", "(-1,2)"), ("A=5,B=3", "A=5, B=3"), (r"5\mathrm{~cm}", "5"),
    (r"5\;\text{cm}", "5"), ("100 per hour", "100"), ("$1.50 per pound", "1.5"), (r"x\in\{1,2\}", "1,2"),
    (r"3.0\times10^8\text{ m/s}", r"3\cdot 10^8"), (r"\frac{5\pi}{6}", r"150^\circ*\pi/180"),
    (r"12 \text{ inches}", "12"), ("$18", "18"), ("18 dollars", "$18"), ("18.00", "18"), ("18 eggs", "18"),
    ("2,125", "2125"), ("$2,125.00", "2125"), ("3 hours", "3"), ("3h", "3"), ("5m", "5"), ("x^{10}", "x^10"),
    (r"\sqrt{16}", "4"), (r"\sqrt16", "4"), ("0.5x", r"\frac{x}{2}"), ("-(x-1)", "1-x"), (r"2\cdot 3^{5}", "486"),
    (r"\frac{a^{2}}{b}", "a^2/b"), (r"\boxed{5}", "5"), ("1/2 + 1/3", "5/6"), (r"\left[1,2\right)", "[1,2)"),
    (r"[1,2) \cup \{5\}", r"\{5\}\cup[1,2)"), (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"\mathbb{R}\setminus\{0\}", r"(-\infty,0)\cup(0,\infty)"), ("3 3/4", "3.75"), (r"-1\frac{3}{4}", "-1.75"),
    ("x³+1", "x^3+1"), ("√(3)/2", r"\frac{\sqrt3}{2}"), ("2√3", r"\sqrt{12}"), ("∛8", "2"), ("⅔", "2/3"),
    ("1⅓", "4/3"), (r"12\,345\,678", "12345678"), ("12,345.67", "12345.67"), ("-∞", r"-\infty"), ("θ = 30°", "30"),
    (r"30^{\circ}", "30°"), ("e^{2πi}", "1"), ("i^2", "-1"), (r"\frac{1}{i}", "-i"), ("3-4i", "-4i+3"),
    ("a = 3, b = 4", "(3,4)"), ("p/q = 3/4", "0.75"), (r"\frac{m}{n}=\frac{3}{4}", r"\frac34"),
    ("P(A) = 0.25", r"\frac14"), ("AB = 12", "12"), (r"m\angle A = 40^\circ", "40"),
    (r"x = -2 \text{ or } x = 3", "-2,3"), (r"x\in(2,5)", "2<x<5"), ("-3<x<3", "(-3,3)"), ("x>0", "0<x"),
    (r"k \geq 7", r"[7,\infty)"), ("(−1, 0) ∪ (0, 1)", r"(-1,0)\cup(0,1)"), (r"\left[-2,\,3\right)", "[-2,3)"),
    ("(2, -1)", "(2,-1)"), ("(2,-1), (3,4)", "(3,4),(2,-1)"), (r"\{(1,2),(3,4)\}", r"\{(3,4),(1,2)\}"),
    (r"\{x,y\}", r"\{y,x\}"), (r"\langle 1,2\rangle", r"\langle 1, 2\rangle"), (r"\text{D}", "D"), ("(d)", "(d)"),
    (r"\text{True}", "True"), ("true", r"\text{True}"), ("False", "false"), (r"\text{red}", "red"),
    ("neither", r"\text{neither}"), (r"\text{Friday}", "Friday"), ("Friday.", r"\text{Friday}"),
    ("odd function", r"\text{odd function}"), (r"\frac{x^2-1}{x-1}", "x+1"), (r"\tan x", r"\frac{\sin x}{\cos x}"),
    (r"2\sin x\cos x", r"\sin 2x"), (r"\sin(2x)", r"2 \sin(x) \cos(x)"), (r"\log_{10} 100", "2"), (r"\log 100", "2"),
    (r"\ln 4", r"2\ln 2"), (r"\frac{\ln 8}{\ln 2}", "3"), ("(a-b)(a+b)", "a^2-b^2"),
    (r"\frac{2}{\sqrt{3}}", r"\frac{2\sqrt{3}}{3}"), (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"),
    (r"5\sqrt{2} + 3", r"3+5\sqrt{2}"), ("x(x-1)(x-2)", "x^3-3x^2+2x"), (r"\pi r^2", r"r^2\pi"),
    (r"\frac{4}{3}\pi r^3", r"\frac{4\pi r^3}{3}"), ("C_n^2", "C_n^2"), (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
    ("n!", r"n\cdot(n-1)!"), ("2^{n+1}", r"2\cdot 2^n"), ("a_{n}", "a_n"), ("y = 3x - 2", "y=-2+3x"),
    ("3x-y-2=0", "y=3x-2"), ("x^2+(y-1)^2=9", "x^2+y^2-2y-8=0"), (r"\frac{x^2}{4}+\frac{y^2}{9}=1", "9x^2+4y^2=36"),
    ("f(x) = 2x", "2x"), ("f'(x)=2x", "2x"), (r"f^{-1}(x)=\frac{x}{2}", "x/2"), (r"S = \pi", r"\pi"),
    (r"V=36\pi \text{ cm}^3", r"36\pi"), (r"36\pi cubic inches", r"36\pi"), (r"15 \text{ units}^2", "15"),
    ("15 sq units", "15"), (r"15\ \text{square feet}", "15"), ("12 L", "12"), ("72 km/hr", "72"), ("3.5 hours", "3.5"),
    ("45 minutes", "45"), ("1000 kg/m^3", "1000"), (r"1\text{ m }", "1"), ("25 degrees Celsius", "25"),
    (r"25^\circ C", "25"), ("25°C", "25"), ("$12.50", "12.5"), ("£20", "20"), ("20 USD", "20"), ("20 cents", "20"),
    ("¢20", "20"), ("200%", r"200\%"), (r"12.5 \%", "12.5"), (r"1.23 \times 10^{5}", "123000"), ("1.23e5", "123000"),
    ("1.23E5", "123000"), ("10^{6}", "1,000,000"), (r"3 \cdot 10^{-2}", "0.03"), ("0.750", "3/4"), (".75", "3/4"),
    ("-.5", "-1/2"), ("0.6667", "0.6667"), (r"0.\overline{142857}", "1/7"), (r"\frac{22}{7}", "22/7"),
    ("22 : 7", "22:7"), (r"\frac{100}{3}", r"33\frac{1}{3}"), (r"\frac{6}{4}", "1.5"), (r"-\frac{6}{-4}", r"\frac32"),
    (r"\frac{-3}{-4}", "0.75"), (r"\dfrac{\frac{1}{2}}{3}", r"\frac16"), ("2(3+4)", "14"), (r"2\times3\times5", "30"),
    (r"2^3 \cdot 3^2", "72"), (r"\frac{2^3}{3^2}", "8/9"), ("(1/2)^3", "1/8"), (r"7 \choose 3", "35"),
    (r"{7 \choose 3}", "35"), ("_7C_3", "_7C_3"), ("123_8", "123_{8}"), (r"\text{1A}_{16}", "1A_{16}"), ("0", "0.0"),
    ("-0", "0"), (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2"), (r"\frac{5}{2}, -1", "-1, 2.5"), ("n=1,2,3", "1,2,3"),
    ("1, 2 and 3", "1,2,3"), ("1, 2, or 3", "1,2,3"), ("2 and -2", r"\pm2"), (r"\pm\sqrt{3}", r"\sqrt3,-\sqrt3"),
    (r"\frac{-1\pm\sqrt5}{2}", r"\frac{-1+\sqrt5}{2},\frac{-1-\sqrt5}{2}"),
    (r"\frac{-1 \pm \sqrt{5}}{2}", r"\frac{-1\pm\sqrt5}{2}"), (r"\boxed{\frac12}", "0.5"), (r"\[5\]", "5"),
    ("$$5$$", "5"), (r"\displaystyle\frac{1}{2}", "1/2"), (r"\phantom{0}5", "5"), ('5\\\\', "5"), ("5,", "5"),
    (r"\,5\,", "5"), (r"\ 5", "5"), (r"\color{red}{5}", "5"), (r"\textbf{5}", "5"), (r"\mathrm{5}", "5"),
    (r"\underline{5}", "5"), (r"\textcolor{blue}{5}", "5"), (r"10\!:\!30", "10:30"), ("10:30 AM", "10:30 a.m."),
    (r"\infty", r"+\infty"), (r"x\to\infty", r"x \to \infty"), (r"\mathbb{Z}", r"\mathbb{Z}"),
    (r"(0,\infty)", r"(0, +\infty)"), (r"\varnothing", r"\emptyset"), (r"\{\}", r"\emptyset"), ("DNE", r"\text{DNE}"),
    (r"\text{does not exist}", "does not exist"), (r"x^\circ", "x"), (r"\overline{AB}", r"\overline{AB}"),
    (r"\vec{v}=(1,2)", "(1,2)"), (r"3\mathbf{i}+4\mathbf{j}", r"3\mathbf{i} + 4\mathbf{j}"),
    (r"3\hat{i}", r"3\hat{i}"), (r"x\equiv 3\pmod 7", r"x \equiv 3 \pmod{7}"), ("|x-2|", "|2-x|"),
    (r"\lvert x\rvert", "|x|"), (r"\max(2,3)", "3"), (r"\lceil 2.1\rceil", "3"), ("5 mod 3", "5 mod 3"),
    (r"\exp(2)", "e^2"), (r"e^{\ln 5}", "5"), (r"\cosh 0", "1"), (r"\arctan(1)", r"\frac{\pi}{4}"),
    (r"\tan^{-1}(1)", r"\pi/4"), (r"\sqrt[3]{27}", "3"), ("8^{1/3}", "2"), (r"8^{\frac13}", "2"),
    (r"4^{-\frac12}", "0.5"), (r"\sqrt{-4}", "2i"), (r"\frac{3+4i}{5}", "0.6+0.8i"), ("|3+4i|", "5"),
]

# (answer, reference): not the same, however near.
DIFFERENT = [
    ("5", "6"), ("3=5", "5"), ("x+y=5", "5"), ("2x=10", "10"), ("x=3=5", "5"), ("5 5", "55"), ("1,2", "12"),
    ("1,00", "100"), ("(1,2)", "(2,1)"), ("[1,2]", "(1,2)"), ("(1,2]", "[1,2)"), ("{1,2}", "(1,2)"), ("x<5", r"x\le5"),
    ("x>2", r"(-\infty,2)"), ("east", "west"), (r"\text{east}", "seat"), ("A", "B"), ("(A) 5", "B"), ("50%", "0.5"),
    ("5 million", "5"), ("1000000.5", "1000000"), ("4.999999", "5"), ("0.33", "1/3"), ("3.14", r"\pi"),
    ("1.414", r"\sqrt2"), ("x=5", "x=-5"), ("x=5,y=3", "x=3,y=5"), ("3,5", "x=5,y=3"), ("1,2,2", "1,1,2"),
    ("1,2", "1,2,3"), ("5,5", "5"), ("5 or 6", "5"), ("5, 6", "6"), (r"\pm 5", "5"), ("5", r"\pm 5"), ("x^2", "2x"),
    ("2^x", "x^2"), (r"\sin x", r"\sin y"), ("101_2", "101_3"), ("101_2", "101"), ("101", "101_2"), ("-5", "5"),
    (r"\frac{1}{0}", "5"), (r"\frac{0}{0}", "0"), (r"\infty", "5"), (r"-\infty", r"\infty"), ("i", "-i"),
    ("1+2i", "1-2i"), ("2^{-98}", "2^{-99}"), (r"6.6\times10^{-34}", r"6.6\times10^{-33}"), ("x^2-1", "x^2+1"),
    ("x", "|x|"), (r"\sqrt{x^2}", "x"), ("1e400", "5"), ("nan", "5"), ("True", "5"), ("yes", "no"), ("10:30", "10:31"),
    ("4:30 a.m.", "4:30 p.m."), ("1:2", "2:1"), (r"\frac{1}{2}x", r"\frac12"), ("5x", "5"), (r"5\pi", "5"),
    ("5 pi", "5"), (r"3\frac12", r"\frac32"), (r"5\text{ or }6", "5"), ("5 and 6", "5"), ("5 or more", "5"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"), ("y=2x+1", "y=2x-1"),
    ("7", "7 = 11a+c"), ("x^2+y^2=4", "x^2+y^2=2"), ("12", "1, 2"), (r"\{5,6\}", "5"),
    (r"(3,\frac{\pi}{2})", r"(3,\frac{\pi}{3})"), (r"\text{none}", "0"), ("", "0"), ("f(2)=5", "f(3)"),
    (r"1.5\times10^3", r"1.5\times10^4"), ("123456789", "123456788"), ("0.1", "0.10001"), ("100.5", "100"),
    ("0", "10^{-10}"), ("10^{-10}", "0"), (r"\sqrt{2}+10^{-8}", r"\sqrt2"), ("x+10^{-8}", "x"), (r"\sqrt{-1}", "1"),
    (r"2\sqrt{3}", r"3\sqrt{2}"), (r"\cos x", r"\sin x"), (r"\log 5", r"\ln 5+1"), ("5 is the answer, or 6", "6"),
    ("answer", "5"), ("5;6", "5"), ("x=5;6", "6"), ("not 5", "5"), (r"5 \ne 6", "5"), ("5<6", "6"), (r"5\to 6", "6"),
    (r"5\approx 6", "6"), (r"x=5\approx 6", "6"), (r"5 \text{ mod } 7", "5"), ("[5,6]", "5"), ("5+0i", "6"),
    (r"\{\}", "0"), ("3 5", "35"), (r"3\ 5", "35"), (r"3\,5", "35"), ("1,2,3", "123"), (r"2\mathrm{m}", "3"),
    (r"5\text{ (not 6)}", "6"), ("3 3/4", "3.5"), (r"2 \frac{1}{2}", "1"), ("1,5", "1.5"), ("1.000", "1000"),
    ("12:30", "12.5"), ("3/4", "4/3"), ("-3/4", "3/4"), ("x=2", "y=2+1"), ("2=x=3", "3"), ("x=y", "5"), ("5=x", "6"),
    ("x>3", "3"), (r"x\ne5", "5"), (r"x\le 5", "5"), (r"\{5\}", "6"), (r"(5,\infty)", "5"), (r"5,\infty", "5"),
    (r"5\cdot", "6"), (r"\sin 30", r"\frac12"), (r"2\pi", "6.28"), (r"\frac{22}{7}", r"\pi"), ("3.1416", r"\pi"),
    ("0.6667", "2/3"), ("0.66666", "2/3"), ("99.9999", "100"), ("(1,2),(3,4)", "(1,2),(4,3)"),
    (r"\{1,2,3\}", r"\{1,2\}"), ("(1,2,3)", r"\{1,2,3\}"), (r"\{1,2\}", "(1,2)"), ("[0,1]", "(0,1)"),
    ("(0,1]", "(0,1)"), (r"[0,\infty)", r"(0,\infty)"), (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1]\cup[2,\infty)"),
    ("x<1 or x>2", "1<x<2"), (r"1\le x\le2", "1<x<2"), ("A, B", "A"), ("AB", "A"), ("A or B", "A"), ("B, not A", "A"),
    ("ABC", "A"), (r"\text{not odd}", r"\text{odd}"), ("not Monday", "Monday"), ("Monday or Tuesday", "Monday"),
    ("10:30 p.m.", "10:30 a.m."), ("i", "1"), ("2+3i", "3+2i"), (r"\sqrt{4}", "-2"), (r"\pm2", "2"), ("2,-2", "2"),
    ("1.1", "1.01"), ("7_8", "7_9"), ("x_1", "x_2"), ("a_n", "a_{n+1}"), ("2x", "2y"), ("x^{2}", "x_{2}"),
    (r"\frac{a}{b}", r"\frac{b}{a}"), ("a-b", "b-a"), (r"\ln x", r"\log_2 x"), ("e^x", "e^{-x}"),
    (r"\sin^2 x", r"\sin x^2"), ("n!", "(n+1)!"), (r"\binom{5}{2}", r"\binom{5}{1}"), ("y=x", "y=-x"),
    ("x^2+y^2=9", "x^2+y^2=3"), ("x+y=2", "x+y=3"), (r"5\%", "0.05"), ("10^3", "10^{-3}"), ("5 thousand", "5"),
    ("5 hundred", "50"), ("1 dozen", "1"), ("5k", "5"), ("5 times 6", "5"), ("5 to 6", "5"), ("5-6", "5"),
    ("between 5 and 6", "5"), ("about 5", "6"), ("approximately 5", "4"), ("5?", "6"), ("unknown", "5"),
    (r"\dots", "5"), (r"1,2,\dots,10", "1,2,10"), ("1+1/e", "1-1/e"), (r"\frac{1}{3}+10^{-9}", r"\frac13"),
    ("0.1+0.2", "0.30000001"), ("1e-10", "2e-10"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "2"), (r"\lfloor 2.5\rfloor", "3"), (r"-\infty", "-5"),
    (r"\emptyset", "0"), (r"\{0\}", r"\emptyset"), (r"\text{undefined}", "0"), (r"3 \cdot 4", "34"), ("3(4)", "34"),
    ("3 x 4", "34"), ("1_000", "1000"), ("0x10", "16"), ("1/0", "0"), ("5/0", r"\infty"), ("0^0", "0"),
    ("f(x)=x", "f(x)=-x"), ("f(3)", "3"), ("S_5", "5"), (r"x=5 \text{ or } 6", "5"), ("5=5=6", "5"), ("6=5+1", "5"),
    ("5+1=6", "5"), ("gold", "5"), ("ans", "5"), ("x", "5"), ("[x+1,x]", "[x,x+1]"), ("5 = 6", "5"),
    (r"5 \equiv 6", "6"), (r"\frac{5}{1}=5=\frac{6}{1}", "5"),
]

HOSTILE = [
    "9^{9^{9^{9}}}", "9**9**9**9", "(9^9)^(9^9)", "(10^9)!", "((5!)!)!", r"\binom{10^8}{10^7}",
    r"\sum_{k=1}^{10^9} k^2 \sin(k)", r"\Gamma(10^9)",
    r"\int e^{x^2}\sin(x^3)\ln(x) dx", "(x+y+z+w)^{200}-(x+y+z+w)^{199}", "(1+x)^{9999}",
    r"\sqrt{" * 300 + "x" + "}" * 300, "7" * 5000, "1," * 3000,
    "(" * 5000,
    "\\" * 5001 + "1", "{}" * 3000, r"\{" * 3000 + "5" + r"\}" * 3000, r"\frac" * 3000, "^" * 3000,
    "|" * 400, "5 " * 300, "1 aaa " * 160,
    "__import__('os').system('touch PWNED')", "exec(\"open('PWNED','w')\")", "[5,open('PWNED','w')][0]",
    "(lambda: open('PWNED','w'))()",
    "__import__('posix')._exit(0)", "().__class__.__bases__[0].__subclasses__()", "sympy.factorial(10**9)",
    r"\input{/etc/passwd}", "\x00", "\ud800", "",
]
FRAGMENTS = [
    "1", "2", "5", "0.5", "x", "y", "i", "+", "-", "*", "/", "^", "_", "=", "<", ",", ";", " ", "(", ")", "[", "]",
    "{", "}", "\\{", "\\}", "\\", "|", "%", "\\frac", "\\sqrt", "\\text", "\\pm", "\\cup", "\\infty", "\\boxed{",
    "\\pi", "\\cdot", "\\le", "!", ".", "²", "½", "√", "∞", "and", "cm", "sin", "\\overline{3}", "\\begin{pmatrix}",
    "\\end{pmatrix}", "&", "\\\\", "\\in", "\\approx", "\\binom", "</think>", "<think>", "million", "\\left",
    "\\right",
]
messy = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join))


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


def boxed(text: str) -> str:
    return rf"So it is \boxed{{{text}}}."


def load(name: str) -> list[dict]:
    path = CASES / name
    if not path.is_file():
        pytest.skip(f"the grading cases are not here: {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# What the answer is


@pytest.mark.parametrize(("response", "answer"), [
    (r"\boxed{5}", "5"),
    (r"no box: 5", None),
    ("", None),
    (r"\boxed{1} and then \boxed{2}", "2"),
    (r"\boxed{5} then \boxed{}", None),                                        # the last box decides, whatever is in it
    (r"\boxed{5} then \boxed{6", None),
    (r"\boxed{6 and again \boxed{5}", "5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{1\right.}", r"\left\{1\right."),                          # an escaped brace does not group
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{x = \boxed{5}}", r"x = \boxed{5}"),
    (r"\fbox{5}", "5"),
    (r"\boxed {5}", "5"),
    (r"\\boxed{5}", "5"),
    (r"\boxed{5}. I have boxed the answer.", "5"),
    (r"stray } and { braces, \boxed{5}} {", "5"),
    (r"<think>\boxed{4}</think> \boxed{5}", "5"),
    (r"\boxed{4}</think> \boxed{5}", "5"),                                     # the prompt opened the thinking
    (r"\boxed{4}</think> done", None),
    (r"<think>\boxed{4}", None),                                               # cut off while thinking
    (r"<think>a</think><think>b \boxed{4}", None),
    (r"</think>\boxed{4}<think>hm", None),
    (r"a</think>b \boxed{1}</think>\boxed{2}", "2"),
])
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


def test_extract_cases():
    wrong = [case for case in load("extract.jsonl") if extract_answer(case["pred"]) != case["want"]]
    assert wrong == []


@given(messy)
def test_extract_never_raises(text):
    answer = extract_answer(text)
    assert answer is None or (answer in text and answer == answer.strip() != "")


@pytest.mark.parametrize("unit", [
    "\\boxed{", "{", "}", "\\", "\\boxed{}", "\\boxed ", "<think>", "</think>", "\\boxed{5} {", "\\boxed{\\boxed{5}}",
])
def test_extract_is_linear(unit):
    times = []
    for size in (100_000, 800_000):
        start = time.process_time()
        extract_answer("\\boxed{" + unit * (size // len(unit)))
        times.append(time.process_time() - start)
    assert times[1] < 2.0 and times[1] < 40 * times[0] + 0.1


# Rational numbers


@pytest.mark.parametrize(("text", "value"), [
    ("12", Fraction(12)), ("-0.5", Fraction(-1, 2)), (".5", Fraction(1, 2)), ("007", Fraction(7)),
    (r"\frac12", Fraction(1, 2)), ("3/4", Fraction(3, 4)),
    (r"2\frac{1}{2}", Fraction(5, 2)), (r"-2\frac{1}{2}", Fraction(-5, 2)), ("2 1/2", Fraction(5, 2)),
    ("2½", Fraction(5, 2)), ("1,234", Fraction(1234)),
    (r"1\,000", Fraction(1000)), (r"16,\!386", Fraction(16386)), ("10{,}000", Fraction(10000)),
    (r"1.5\times10^{-3}", Fraction(3, 2000)),
    ("2e3", Fraction(2000)), ("2^{10}", Fraction(1024)), ("2^3^2", Fraction(512)), ("-2^2", Fraction(-4)),
    ("(1+2)/3", Fraction(1)), ("4!", Fraction(24)),
    (r"0.\overline{3}", Fraction(1, 3)), (r"0.1\overline{6}", Fraction(1, 6)), (r"\frac{\frac12}{3}", Fraction(1, 6)),
    ("(2)(3)", Fraction(6)),
])
def test_rational_values(text, value):
    assert rationals.read(notation.canonical(text)).number == value


@pytest.mark.parametrize("text", ["", "x", "1,2", "5 5", r"2\frac{3}{2}", r"\sqrt{4}", "9^{9^9}", "10^{10^{10}}",
    "1000!", "7" * 5000, "2^{1/2}", "(" * 100 + "1" + ")" * 100])
def test_no_rational_values(text):
    with pytest.raises(rationals.Undecided):
        rationals.read(text)


@given(st.fractions(), st.fractions())
def test_every_rational_equals_itself_and_no_other(a, b):
    ways = [f"{a.numerator}/{a.denominator}", rf"\frac{{{a.numerator}}}{{{a.denominator}}}",
        f"x = {a.numerator} / {a.denominator}"]
    for way in ways:
        assert exact(way, ways[1]) is True
        assert exact(way, f"{b.numerator}/{b.denominator}") is (a == b)


@given(st.integers(-10**9, 10**9), st.integers(0, 6))
def test_every_decimal_equals_its_fraction(digits, places):
    value = Fraction(digits, 10**places)
    assert exact(f"{digits / 10**places:.{places}f}", str(value)) is True


@given(messy, messy)
def test_exact_never_raises(a, b):
    assert exact(a, b) in (True, False, None)
    assert exact(f"={a}", "=") in (True, False, None)
    assert exact(a, a) is (bool(notation.canonical(a)))


# Equal or not


@pytest.mark.parametrize(("prediction", "gold", "verdict"), [
    ("7", "7", True), ("7", "8", False), ("9007199254740993", "9007199254740992", False), ("0.333333", "1/3", True),
    ("0.33", "1/3", False),
    ("4.9999999", "5", False), ("50%", "50", True), ("50%", "0.5", False), ("5 cm", "5", True),
    (r"5\text{ cm}", "5", True), ("5 million", "5000000", True),
    ("5 or more", "5", False), ("(0,1)", "[0,1]", False), ("(1,2)", "(2,1)", False), ("1,2", "2,1", True),
    (r"\{1,2\}", "2,1", True), ("1,2,2", "1,1,2", False),
    ("3=5", "5", False), ("x=5", "5", True), ("x=y+1", "5", None), ("5 5", "55", False), ("1 000", "1000", False),
    ("10_3", "103", False),
    ("101_2", "101_3", False), (r"\frac{1}{0}", r"\frac{2}{0}", False), ("east", r"\text{east}", True),
    ("east", "west", False), (r"\text{none}", "0", False),
    ("(B)", "B", True), ("B. 12", "B", True), ("A", "B", False), ("x+1", "1+x", None), (r"\sqrt{4}", "2", None),
    ("", "5", False), ("5", "", False),
    (r"\pm 2", "2,-2", True), ("x>2", r"(2,\infty)", True), ("x>2", r"[2,\infty)", None),
    ("4:30 PM", r"4:30 \text{ p.m.}", True),
])
def test_exact(prediction, gold, verdict):
    assert exact(prediction, gold) is verdict


def test_equal_answers(grader):
    grades = grader.grade([boxed(prediction) for prediction, _ in EQUAL], [gold for _, gold in EQUAL])
    assert [pair for pair, grade in zip(EQUAL, grades, strict=True) if not grade.correct] == []


def test_different_answers(grader):
    grades = grader.grade([boxed(prediction) for prediction, _ in DIFFERENT], [gold for _, gold in DIFFERENT])
    assert [pair for pair, grade in zip(DIFFERENT, grades, strict=True) if grade.correct] == []


def test_pairs(grader):
    cases = load("pairs.jsonl")
    grades = grader.grade([boxed(case["pred"]) for case in cases], [case["gold"] for case in cases])
    wrong = [(case, grade) for case, grade in zip(cases, grades, strict=True) if grade.correct != case["equal"]]
    assert [case for case, grade in wrong if grade.correct][1:] == []           # at most one false positive
    assert len(wrong) <= 0.03 * len(cases), wrong


# Hostile answers


@pytest.mark.parametrize("unit", [
    "1,", "x=", "=5", r"\pm", r"\in ", r"\text{a}", "1 aaa ", "(1,", "{", "x<1 or ", r"\begin{pmatrix}", "½",
    "5 million", "sqrt(", r"\frac",
])
def test_exact_is_quick_on_long_answers(unit):
    start = time.process_time()
    for gold in ("5", "x=5", "(1,2)"):
        assert exact(unit * (notation.MAX_CHARACTERS // len(unit) - 1) + "5", gold) is not True
    assert time.process_time() - start < 2.0


def test_hostile_answers_cost_little_and_gain_nothing(grader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grades = grader.grade([boxed(text) for text in HOSTILE] + HOSTILE, ["7"] * 2 * len(HOSTILE))
    assert not any(grade.correct for grade in grades)
    assert not {grade.status for grade in grades} & {"error", "hard_kill", "budget"}
    assert list(tmp_path.rglob("*PWNED*")) == list(REPOSITORY.rglob("PWNED")) == []


def test_adversarial_cases(grader):
    cases = load("adversarial.jsonl")
    start = time.monotonic()
    grades = grader.grade([boxed(case["pred"]) for case in cases], [case["gold"] for case in cases])
    assert time.monotonic() - start < 15
    clear = [(case, grade) for case, grade in zip(cases, grades, strict=True) if case["want"] is not None]
    assert [case["name"] for case, grade in clear if grade.correct != case["want"]] == []


def test_a_batch_with_hostile_answers_is_quick(grader):
    honest = [boxed(rf"\frac{{{row}\sqrt{{3}}}}{{2}}") if row % 5 == 0 else boxed(str(row)) for row in range(250)]
    golds = [rf"{row} \sqrt{{0.75}}" if row % 5 == 0 else str(row) for row in range(250)]
    start = time.monotonic()
    grades = grader.grade(honest + [boxed(text) for text in HOSTILE[4:10]], golds + ["7"] * 6)
    assert time.monotonic() - start < 5 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert [grade.correct for grade in grades] == [True] * 250 + [False] * 6


@pytest.mark.parametrize("text", ["9^{9^{9}}", r"2^{10^{9}}", "(10^9)!", "99999!", "((5!)!)!", "x^{100000}",
    "(9^9)^(9^9)", "1" * 200, "x+" * 300 + "x",
                                  "(" * 20 + "x" + ")" * 20, "a," * 50])
def test_guard_stops(text):
    assert symbolic.guard(notation.canonical(text))


@pytest.mark.parametrize("text", ["e^{x^2}", "5!", "n!", r"\frac{10!}{8!}", "2^{2005}", "x^{10}",
    r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", "(x+1)^{n^2}"])
def test_guard_lets_pass(text):
    assert not symbolic.guard(notation.canonical(text))


# The workers and their supervision

ALGEBRA = (boxed(r"\sqrt{8}"), r"2\sqrt{2}")


def only(grader: Grader, response: str, gold: str) -> Grade:
    return grader.grade([response], [gold])[0]


def processes(grader: Grader) -> list[subprocess.Popen]:
    return [worker.process for worker in grader._pool._living]


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        status = Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True                             # ended; whoever has adopted it has not looked yet
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def small():
    with Grader(workers=1, cpu_seconds=0.4, wall_seconds=1.0) as grader:
        assert only(grader, *ALGEBRA).status == "symbolic"
        yield grader


def test_statuses(small):
    assert only(small, "nothing", "5") == Grade(False, None, "no_answer", pytest.approx(0, abs=1))
    assert (only(small, boxed("5"), "5").status, only(small, boxed("6"), "5").correct) == ("exact", False)
    assert only(small, boxed("1" * 30_000), "5").status == "too_long"
    assert only(small, boxed("9^{9^{9}}"), "5").status == "guard"
    assert only(small, *ALGEBRA) == Grade(True, r"\sqrt{8}", "cached", pytest.approx(0, abs=1))


def test_the_same_answer_is_asked_once(small):
    before = small.stats()["symbolic"]
    grades = small.grade([boxed(r"\sqrt{50}")] * 20, [r"5\sqrt{2}"] * 20)
    assert all(grade.correct and grade.status == "symbolic" for grade in grades)
    assert sum(grade.seconds > 0 for grade in grades) == 1
    assert small.stats()["symbolic"] == before + 20


def test_soft_stop_keeps_the_worker_and_is_not_cached(small):
    (process,) = processes(small)
    for _ in range(2):
        assert only(small, boxed(r"\int e^{x^2}\sin(x^3)\ln(x) dx"), "5").status == "soft_timeout"
    assert processes(small) == [process] and only(small, boxed("x+x"), "2x").correct


def test_a_dead_worker_is_replaced_and_the_answer_still_counts(small):
    (process,) = processes(small)
    os.kill(process.pid, signal.SIGKILL)
    assert only(small, boxed(r"\sqrt{12}"), r"2\sqrt{3}").correct
    assert small.stats()["died"] == 1


def test_a_stuck_worker_is_killed_and_nothing_is_cached(small):
    (process,) = processes(small)
    os.kill(process.pid, signal.SIGSTOP)            # what C code that holds the interpreter looks like from outside
    start = time.monotonic()
    assert only(small, boxed(r"\sqrt{20}"), r"2\sqrt{5}").status == "hard_kill"
    assert time.monotonic() - start < 4 and gone(process.pid)
    grade = only(small, boxed(r"\sqrt{20}"), r"2\sqrt{5}")
    assert grade.correct and grade.status == "symbolic"


def test_a_killer_answer_is_an_error_not_a_hang(small, monkeypatch):
    def dies(*_):
        raise pool.WorkerDied("it ended")

    monkeypatch.setattr(pool.Worker, "compare", dies)
    assert only(small, boxed(r"\sqrt{28}"), r"2\sqrt{7}") == Grade(False, r"\sqrt{28}", "error", pytest.approx(0,
        abs=8))


def test_worn_workers_are_replaced(small, monkeypatch):
    monkeypatch.setattr(pool, "MAX_TASKS", 0)
    (process,) = processes(small)
    assert only(small, boxed(r"\sqrt{32}"), r"4\sqrt{2}").correct
    assert gone(process.pid) and processes(small) != [process] and small.stats()["recycled"] == 1


def test_memory_is_bounded(small):
    verdict = small._pool.compare("(10^{9})!", "5", time.monotonic() + 10)      # past the guard
    assert not verdict.correct
    assert only(small, boxed(r"\sqrt{44}"), r"2\sqrt{11}").correct


def test_budget(small, monkeypatch):
    monkeypatch.setattr(small, "step_budget_seconds", 0.0)
    grades = small.grade([boxed(r"\sqrt{45}")] * 3, [r"3\sqrt{5}"] * 3)
    assert [(grade.correct, grade.status) for grade in grades] == [(False, "budget")] * 3
    monkeypatch.undo()
    assert only(small, boxed(r"\sqrt{45}"), r"3\sqrt{5}").correct               # not cached


def test_budget_bounds_a_call_with_a_stuck_worker(small, monkeypatch):
    monkeypatch.setattr(small, "step_budget_seconds", 0.5)
    os.kill(processes(small)[0].pid, signal.SIGSTOP)
    start = time.monotonic()
    grades = small.grade([boxed(rf"\sqrt{{{row * row * 7}}}") for row in range(2, 12)],
        [rf"{row}\sqrt{{7}}" for row in range(2, 12)])
    assert {grade.status for grade in grades} == {"budget"} and time.monotonic() - start < 3


def test_threads(grader):
    def check(row: int) -> bool:
        return all(grade.correct for grade in grader.grade([boxed(rf"\sqrt{{{row * row * 3}}}")] * 2,
        [rf"{row}\sqrt{{3}}"] * 2))

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert all(threads.map(check, range(2, 26)))


def test_submit_runs_in_the_background(grader):
    future = grader.submit([ALGEBRA[0], boxed("6")], [ALGEBRA[1], "5"])
    assert threading.current_thread() is threading.main_thread()
    assert [grade.correct for grade in future.result(timeout=60)] == [True, False]


def test_grade_wants_lists_of_one_length(grader):
    with pytest.raises(ValueError, match="as many golds as responses, got 2 and 1"):
        grader.grade(["a"], ["b", "c"])


def test_check_golds(grader):
    assert grader.check_golds(["5", r"\frac{1}{2}", "", "  ", "{5", r"x^2", "7" * 30_000, "(-1,2]",
        r"\text{east}"]) == [2, 3, 4, 6]


def test_the_cache_is_bounded():
    with Grader(workers=1, cache_size=2) as grader:
        for row in (2, 3, 5):
            assert only(grader, boxed(rf"\sqrt{{{4 * row}}}"), rf"2\sqrt{{{row}}}").correct
        assert len(grader._cache) == 2
        assert only(grader, boxed(r"\sqrt{20}"), r"2\sqrt{5}").status == "cached"
        assert only(grader, boxed(r"\sqrt{8}"), r"2\sqrt{2}").status == "symbolic"


def test_workers_are_shielded(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    with Grader(workers=1) as grader:
        (process,) = processes(grader)
        assert only(grader, *ALGEBRA).correct
        assert os.getsid(process.pid) == process.pid                            # Ctrl-C in the terminal passes it by
        if Path("/proc/self/environ").exists():
            assert b"SECRET_TOKEN" not in Path(f"/proc/{process.pid}/environ").read_bytes()
            loaded = Path(f"/proc/{process.pid}/maps").read_text()
            assert "jaxlib" not in loaded and "numpy" not in loaded
    assert gone(process.pid)
    with pytest.raises(RuntimeError, match="closed"):
        only(grader, boxed(r"\sqrt{8}+1"), r"2\sqrt{2}+1")


PARENT = """
import sys
from effreason.grades import Grader
grader = Grader(workers=2)
assert grader.grade([r"\\\\boxed{\\\\sqrt{8}}"], [r"2\\\\sqrt{2}"])[0].correct
assert not {"jax", "numpy", "sympy"} & set(sys.modules)
print(*[worker.process.pid for worker in grader._pool._living], flush=True)
sys.stdin.read()
"""


def test_workers_die_with_their_parent_and_ignore_the_working_directory(tmp_path):
    for name in ("sympy.py", "json.py", "math_verify.py", "effreason.py"):
        (tmp_path / name).write_text("raise SystemExit('imported from the working directory')\n")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, "-P", "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=tmp_path, env=environment)
    assert parent.stdout is not None and parent.stdin is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_workers_that_cannot_start_are_reported(monkeypatch):
    monkeypatch.setattr(pool, "_environment", lambda: {"PYTHONHOME": "/nowhere"})
    with Grader(workers=1) as grader, pytest.raises(RuntimeError, match="grading workers cannot be started"):
        only(grader, *ALGEBRA)
