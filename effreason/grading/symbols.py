"""Tables from Unicode characters and LaTeX commands to canonical notation."""

SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()", strict=True))
GREEK = ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda "
         "mu nu xi omicron pi rho varsigma sigma tau upsilon phi chi psi omega").split()
GREEK_CAPITALS = dict(zip("ΓΔΘΛΞΠΣΦΨΩ",
                          "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split(),
                          strict=True))


def _table(text: str) -> dict[str, str]:
    """Parses lines of "new old old ..." into {old: new}."""
    rows = [line.split() for line in text.splitlines()]
    return {old: row[0] for row in rows for old in row[1:]}


SYMBOLS = {
    **{chr(0x3B1 + index): "\\" + name for index, name in enumerate(GREEK)},
    **{letter: "\\" + name for letter, name in GREEK_CAPITALS.items()},
    **dict(zip("∞×÷±∓≤≥≠≈≡∪∩∅∠△∖∛∜√ϕ⟨⟩⌊⌋⌈⌉∣‖∑∫∶℃℉∴", r"""
        \infty \times \div \pm \mp \le \ge \ne \approx \equiv \cup \cap \emptyset \angle \triangle
        \setminus \sqrt[3] \sqrt[4] \sqrt \phi \langle \rangle \lfloor \rfloor \lceil \rceil
        | \| \sum \int : ^{\circ}C ^{\circ}F \therefore""".split(), strict=True)),
    **{letter: rf"\mathbb{{{name}}}" for letter, name in zip("ℝℤℚℕℂ", "RZQNC", strict=True)},
    **_table(r"""
    \cdot · ⋅ ∙
    ^{\circ} ° º ˚
    - − – ‐ ‑ ﹣
    \in ∈ ∊
    ' ′ ’
    / ⁄ ∕
    \to → ⟶
    \Rightarrow ⇒ ⟹
"""),
    **dict.fromkeys("“”€¢₽₩₫£¥₹￥✓✔✅☑■□∎" + '"', ""),
    "，": ", ", "、": ", ", "；": ";", "：": ":", "。": ".", "或": r" \lor ",
    **dict.fromkeys("且和与及", r" \land "),
}

# Commands that have several names.
RENAMED = _table(r"""
    \frac \dfrac \tfrac \cfrac \nicefrac \sfrac \flatfrac
    \binom \dbinom \tbinom
    \le \leq \leqslant
    \ge \geq \geqslant
    \ne \neq
    \cdot \times \ast *
    | \lvert \rvert \vert \mid
    ^{\circ} \degree \textdegree
    \emptyset \varnothing
    \dots \ldots \cdots \dotsc \dotsb
    \land \wedge
    \lor \vee
    \mod \bmod \pmod
    \approx \approxeq \simeq
    \setminus \backslash \smallsetminus
    \operatorname{arcsec} \arcsec
""") | dict(zip(
    r"\lt \gt \lbrace \rbrace \lbrack \rbrack \lparen \rparen \colon \| \infin \bigcup \bigcap \lg"
    r" \prime \imath \jmath \% \# \& \_".split(),
    r"< > \{ \} [ ] ( ) : || \infty \cup \cap \log ' i j % # & _".split(), strict=True))
SPACES = ("\\,", "\\;", "\\:", "\\>", "\\ ", "\\quad", "\\qquad", "\\enspace", "\\thinspace",
          "\\space", "~")
DROPPED = (
    r"\pounds \euro \textdollar \cent \textcent \$ \! \left \right "
    r"\middle \boxed \fbox \displaystyle \textstyle "
    r"\limits \nolimits \rm \bf \it \tt \sf \tiny \small \normalsize "
    r"\large \Large \LARGE \huge \Huge \checkmark "
    r"\square \blacksquare \qed \ensuremath \noindent \hfill \strut "
    r"\mathstrut \mathop \mathclose \mathopen "
    r"\( \) \[ \] \- \/ \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \Biggl \Biggr "
).split()
RENAMED |= dict.fromkeys(SPACES, " ") | dict.fromkeys((*DROPPED, "$"), "")
TEXTS = (r"\bm \bold \boldsymbol \emph \hbox \mathbf \mathit \mathrm "
         r"\mathsf \mathtt \mbox \pmb \text \textbf "
         r"\textit \textnormal \textrm \textsf \texttt \underline ").split()
