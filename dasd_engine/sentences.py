r"""Sentences of reasoning text, as spans of UTF-8 bytes that cover the text exactly.

    >>> text = "<think>\nSo $x = 1.5$. Then 2x is 3.\n</think>\nThe answer is 3."
    >>> [text.encode()[begin:end].decode() for begin, end in split(text)]
    ['<think>\n', 'So $x = 1.5$.', ' Then 2x is 3.\n', '</think>\n', 'The answer is 3.']

No text of the method states a splitter: these rules are ours.

A sentence ends behind a line break, and behind . ! ? or … (with the quotes, brackets and emphasis that close there)
where white space and something that can begin a sentence follow: no operator, no word in lower case. 。！？ end one
wherever they stand. No end are
    decimals and URLs (nothing follows their periods), abbreviations ("e.g.", "Fig. 3", "U.S."), initials ("J. Smith"),
    numbers and letters of lists and steps at the beginning of a sentence ("1.", "(b).", "Step 2."),
    factorials ("5! = 120") and ellipses inside a series ("1 + ... + n").
Whole stay: math ($…$ by Pandoc's rule for dollars, $$…$$, \(…\), \[…\], \begin{}…\end{}) up to the next blank line, as
in TeX, code between backticks in a line, and fenced code. What is opened and never closed is ordinary text.

White space stands where tokenisers put it: blanks in front of the sentence they lead to, line breaks behind the one
they end. Special markers (<think>, </think>, <|im_end|>, a header of harmony's, …) are pieces of their own, with the
line breaks behind them; `is_marker` tells them, and nothing is whole across one.

The time is linear in the text, whatever it holds: every expression here looks at a byte a bounded number of times.
"""

import re
from collections.abc import Sequence

from dasd_engine.errors import InputError

Span = tuple[int, int]  # bytes from, bytes to

# The markers that teachers and templates write; each is one piece, and so is a whole harmony header.
_MARKER = re.compile(
    rb"<(?:/?(?:think|thinking|thought|reasoning|answer|response|seed:think|mm:think)>"
    rb"|\|start\|>[^<\n]{0,64}+(?:<\|channel\|>[^<\n]{0,64}+)?(?:<\|constrain\|>[^<\n]{0,64}+)?<\|message\|>"
    rb"|\|channel\|>[^<\n]{0,64}+(?:<\|constrain\|>[^<\n]{0,64}+)?<\|message\|>"
    rb"|\|[A-Za-z][\w.-]{1,63}\|>|/?(?:start_of_turn|end_of_turn)>"
    rb"|\xef\xbd\x9c[^<>\n]{1,64}\xef\xbd\x9c>)"  # <｜User｜>
    rb"|\[/?THINK\]|\xe2\x97\x81/?think\xe2\x96\xb7"  # ◁think▷
)
_BREAKS = re.compile(rb"(?:[ \t]*+[\r\n])*+")

# Where a sentence may end: a run of line breaks; a run of . ! ? … or 。！？ with what closes behind it. What follows
# the blanks must be able to begin a sentence: no operator, and behind . ! … no word of several letters in lower case
# ("sin(x)" and "ab = c" are no words). All begin in one set of bytes, for speed.
_CLOSERS = rb"(?:[\"')\]}*_]|\xe2\x80[\x99\x9d]|\xc2\xbb|\xe3\x80[\x8b\x8d\x8f\x91]|\xef\xbc\x89)*+"
_CLOSERS += rb"(?: ?\xe2(?:\x9c[\x85\x93\x94\x97]|\x9d\x8c|\x88\x8e|\x96[\xa0\xa1]))?+"  # ✅ ✓ ✔ ✗ ❌ ∎ ■ □
_RUN = rb"(?<![.!?].)(?<!\xe2\x80\xa6.)(?:\x80\xa6)?(?:[.!?]|\xe2\x80\xa6)*+"  # tried at its first character only
_NEXT = rb"[^\s=+/<>,;:)\]}&|^%.!*"
_WORD = rb"[a-z](?:(?![a-z])|[a-z]*+[\w(=^\\])|(?P<foreign>[\x80-\xff])"
_END = re.compile(
    rb"[\r\n.!?\xe2\xe3\xef](?:"
    rb"(?<=[\r\n])(?:[ \t]*+[\r\n])*+"
    rb"|(?P<stop>(?:(?<=[.!])|(?<=\xe2)(?=\x80\xa6))" + _RUN + rb")" + _CLOSERS
    + rb"(?=[ \t]++(?:" + _NEXT + rb"a-z\x80-\xff]|\*(?![ \t])|" + _WORD + rb"))"
    rb"|(?P<ask>(?<=\?)" + _RUN + rb")" + _CLOSERS + rb"(?=[ \t]++(?:" + _NEXT + rb"]|\*(?![ \t])))"
    rb"|(?P<wide>(?<=\xe3)\x80\x82|(?<=\xef)(?:\xbc[\x81\x9f]|\xbd\xa1))"
    rb"(?:\xe3\x80\x82|\xef\xbc[\x81\x9f]|\xef\xbd\xa1)*+" + _CLOSERS + rb")",
    re.DOTALL,
)  # fmt: skip
_BEGINS = re.compile(rb"[ \t]++(?:" + _NEXT + rb"a-z]|[a-z](?![a-z]))")
_BLANKS = re.compile(rb"[ \t]*+")

_ABBREVIATIONS = frozenset(
    b"mr mrs ms dr prof st mt vs cf viz al ca approx resp rev gen sen gov lt col sgt capt hon messrs".split()
)
_BEFORE_NUMBERS = frozenset(
    b"no nos fig figs eq eqs eqn eqns sec secs ch chap thm lem prop cor def ex p pp vol art ref refs tab mod"
    b" jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
_NUMBER = re.compile(rb"[(\[]?[0-9]")
_DOTTED = re.compile(rb"(?:[A-Za-z]{1,2}\.)+[A-Za-z]{1,2}")  # "e.g", "U.S", "Ph.D", before the last period
_LABEL = re.compile(
    rb"[#>*_\-+\s]*+[(\[]?(?:[0-9]{1,3}|[A-Za-z]|[ivxIVX]{1,5}|(?:Step|Case|Part|Claim|Lemma|Theorem|Proposition"
    rb"|Definition|Example|Exercise|Problem|Question|Option|Approach|Method)[ \t]+[0-9A-Za-z]{1,3})[)\]]*+"
)
_INITIAL = re.compile(rb"(?:^|[\s(])[A-Z][a-z]*\.?[ \t]+[A-Z]\Z")
_NAME = re.compile(rb"(?!(?:The|Then|This|That|So|Since|But|We|It|Thus|Hence|Therefore|Now|If|Let|In|For)\b)[A-Z][a-z]")
_WORD_BYTES = 12  # enough for any abbreviation and the bracket in front of it
_LABEL_BYTES = 32  # enough for any label, and for a name in front of an initial

_OPEN = re.compile(rb"\\(?:[\\$`]|[\[(]|begin\{)|\$(?:(?![\s$])|\$(?!\$)|\$++)|`++")
_FENCE = re.compile(rb"^[ \t]*+(`{3,}+|~{3,}+)([^`\n]*+)$", re.MULTILINE)
_BLANK_LINE = re.compile(rb"\n[ \t\r]*+\n")
_CLOSE = {
    b"$": re.compile(rb"(?:[^$\\]|\\.)*+\$", re.DOTALL),
    b"$$": re.compile(rb"(?:[^$\\]|\\.|\$(?!\$))*+\$\$", re.DOTALL),
    b"\\(": re.compile(rb"(?:[^\\]|\\[^)])*+\\\)", re.DOTALL),
    b"\\[": re.compile(rb"(?:[^\\]|\\[^\]])*+\\\]", re.DOTALL),
}
_CODE = re.compile(rb"(`++)[^`\n]++\1(?!`)")
_ENVIRONMENT = re.compile(rb"\\(begin|end)\{([A-Za-z*]{1,32})\}")


def split(text: str | bytes) -> list[Span]:
    """Spans (begin, end) in UTF-8 bytes, in order, without gaps, none empty; [] for an empty text.

    Bytes need not be valid UTF-8. InputError for a str that cannot be encoded (half a surrogate pair).
    """
    data = to_bytes(text)
    spans: list[Span] = []
    begin = 0
    for marker in _MARKER.finditer(data):
        _add_sentences(spans, data, begin, marker.start())
        begin = _end_of(_BREAKS, data, marker.end())
        spans.append((marker.start(), begin))
    _add_sentences(spans, data, begin, len(data))
    return spans


def is_marker(text: bytes, span: Span) -> bool:
    """Whether a span of `split` is a special marker, which no sentence is."""
    return _MARKER.match(text, span[0]) is not None


def parts(text: bytes) -> list[Span]:
    """What stands between the markers: thinking, answer, … Parts of white space alone are left out."""
    edges = [0]
    for marker in _MARKER.finditer(text):
        edges += marker.span()
    edges.append(len(text))
    between = zip(edges[::2], edges[1::2], strict=True)
    return [(begin, end) for begin, end in between if begin < end and not text[begin:end].isspace()]


def to_bytes(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not Unicode: half a surrogate pair at character {error.start}") from None


def merge_short(
    spans: Sequence[Span], teacher_counts: Sequence[int], student_counts: Sequence[int], minimum: int = 3
) -> list[Span]:
    """Join sentences of fewer than `minimum` tokens under either tokeniser to the next one, the last to the one before.

    `spans` without markers: sentences that do not touch are in different parts (thinking, answer) and are never
    joined, so a part that is short itself stays short.
    """
    merged: list[Span] = []
    index = 0
    while index < len(spans):
        begin, end = spans[index]
        teacher, student = teacher_counts[index], student_counts[index]
        index += 1
        while min(teacher, student) < minimum and index < len(spans) and spans[index][0] == end:
            end = spans[index][1]
            teacher, student = teacher + teacher_counts[index], student + student_counts[index]
            index += 1
        if min(teacher, student) < minimum and merged and merged[-1][1] == begin:
            begin = merged.pop()[0]
        merged.append((begin, end))
    return merged


# ---------------------------------------------------------------------------------------------- ends of sentences


def _add_sentences(spans: list[Span], data: bytes, begin: int, end: int) -> None:
    """The sentences of data[begin:end], which holds no marker."""
    if begin == end:
        return
    part = data[begin:end]
    if part.isspace():
        if spans:  # behind a marker: part of it
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((begin, end))
        return
    last = 0
    for cut in _cuts(part):
        spans.append((begin + last, begin + cut))
        last = cut
    spans.append((begin + last, end))


def _cuts(part: bytes) -> list[int]:
    """Where one sentence of `part` ends and the next begins, rising."""
    cuts: list[int] = []
    size, last = len(part), 0
    first, stop = size - len(part.lstrip()), len(part.rstrip())  # no piece is white space alone
    regions = iter(_whole(part))
    inner, outer = next(regions, (size, size))  # the first region that does not end in front of here
    for match in _END.finditer(part):
        begin, end = match.span()
        kind = match.lastgroup
        if begin > inner:
            while outer <= begin:  # behind $x = 5.$ too a sentence may end
                if _ends_math(part, inner, outer):
                    cuts.append(outer)
                    last = outer
                inner, outer = next(regions, (size, size))
            if inner < end < outer:
                continue
        if kind is None:
            if end <= first or end >= stop:
                continue
        elif kind == "wide":
            at = _blanks_end(part, end)
            if part[at : at + 1] in b"\r\n":  # or nothing more: the line break ends it, or the text
                continue
        elif kind != "ask":
            if kind == "foreign" and _in_lower_case(part, _blanks_end(part, end)):
                continue
            run = part[begin : match.end("stop")]
            if _is_inner_period(part, last, begin, end) if run == b"." else _is_inner_run(run, part, begin, end):
                continue
        cuts.append(end)
        last = end
    return cuts


def _is_inner_run(run: bytes, part: bytes, begin: int, end: int) -> bool:
    """Whether terminators other than one period stand inside a sentence: a factorial, or part of a series."""
    before = part[begin - 1 : begin] or b"\n"
    if run == b"!":  # behind a number, a bracket or a variable it is a factorial, unless a word in upper case follows
        variable = before.isalpha() and not part[begin - 2 : begin - 1].isalpha()
        at = _blanks_end(part, end)
        return (variable or before in b"0123456789)}") and not part[at : at + 1].isupper()
    if run[:2] == b".." or run[:1] == b"\xe2":
        return before in b" \t,+*-=<(&"
    return False


def _is_inner_period(part: bytes, last: int, dot: int, end: int) -> bool:
    """Whether the period at `dot` belongs to an abbreviation, an initial, or the number of a list or step."""
    if dot - last <= _LABEL_BYTES and _LABEL.fullmatch(part, last, dot):
        return True
    words = part[max(last, dot - _WORD_BYTES) : dot].rsplit(maxsplit=1)
    word = words[-1] if words else b""
    if not word.isalpha():
        word = word.lstrip(b"([{\"'*_-")
    known = word.lower()
    if known in _ABBREVIATIONS:
        return True
    if known in _BEFORE_NUMBERS:
        return _NUMBER.match(part, _blanks_end(part, end)) is not None
    if len(word) == 1:
        tail = part[max(last, dot - _LABEL_BYTES) : dot]
        return bool(_INITIAL.search(tail) and _NAME.match(part, _blanks_end(part, end)))
    return b"." in word and known not in (b"a.m", b"p.m") and _DOTTED.fullmatch(word) is not None


def _blanks_end(part: bytes, at: int) -> int:
    return _end_of(_BLANKS, part, at)


def _end_of(pattern: re.Pattern[bytes], part: bytes, at: int) -> int:
    match = pattern.match(part, at)
    return match.end() if match else at


def _in_lower_case(part: bytes, at: int) -> bool:
    """Whether a word of several letters in lower case begins there."""
    word = part[at : at + 8].decode("utf-8", "ignore")
    return word[:1].islower() and word[1:2].isalpha()


# ---------------------------------------------------------------------------------------------- what stays whole


def _whole(part: bytes) -> list[Span]:
    """Spans of code and math, disjoint and rising."""
    spans: list[Span] = []
    last = 0
    for fence in _fences(part):
        _add_math(spans, part, last, fence[0])
        spans.append(fence)
        last = fence[1]
    _add_math(spans, part, last, len(part))
    return spans


def _fences(part: bytes) -> list[Span]:
    """Fenced code: from a line of ``` or ~~~ to the next bare one with the same fence."""
    if b"```" not in part and b"~~~" not in part:
        return []
    lines = [(match.start(), match.end(), match[1], not match[2].strip()) for match in _FENCE.finditer(part)]
    last = {fence: begin for begin, _, fence, bare in lines if bare}  # the last one that could close it
    found: list[Span] = []
    opened, wanted = 0, b""
    for begin, end, fence, bare in lines:
        if wanted:
            if bare and fence == wanted:
                found.append((opened, end))
                wanted = b""
        elif last.get(fence, -1) > begin:
            opened, wanted = begin, fence
    return found


def _add_math(spans: list[Span], part: bytes, at: int, end: int) -> None:
    """Math and inline code of part[at:end]."""
    environments: dict[int, int] | None = None
    paragraph = at  # where the present paragraph ends; nothing is whole across it
    open_ended: list[bytes] = []  # what is not closed any more in it
    while opening := _OPEN.search(part, at, end):
        begin, at = opening.span()
        kind = opening[0]
        if begin >= paragraph:
            blank = _BLANK_LINE.search(part, begin, end)
            paragraph, open_ended = blank.start() if blank else end, []
        if kind in _CLOSE:
            if kind in open_ended:
                continue
            match = _CLOSE[kind].match(part, at, paragraph)
            if match is None:
                open_ended.append(kind)
                continue
            close = match.end()
            if kind == b"$" and (part[close - 2] in b" \t\r\n" or part[close : close + 1].isdigit()):
                continue  # "$5 and $6" are prices
        elif kind == b"\\begin{":
            environments = _environments(part, begin, end) if environments is None else environments
            close = environments.get(begin, end + 1)
            if close > paragraph:
                continue
        elif match := _CODE.match(part, begin, paragraph):
            close = match.end()
        else:
            continue
        at = close
        spans.append((begin, close))


def _environments(part: bytes, at: int, end: int) -> dict[int, int]:
    r"""Where each \begin{x} is and its \end{x} ends; what is left open inside another is left out."""
    pairs: dict[int, int] = {}
    opened: list[tuple[bytes, int]] = []
    depth: dict[bytes, int] = {}
    for match in _ENVIRONMENT.finditer(part, at, end):
        word, name = match.groups()
        if word == b"begin":
            opened.append((name, match.start()))
            depth[name] = depth.get(name, 0) + 1
        elif depth.get(name):
            while True:
                inner, begin = opened.pop()
                depth[inner] -= 1
                if inner == name:
                    pairs[begin] = match.end()
                    break
    return pairs


def _ends_math(part: bytes, begin: int, end: int) -> bool:
    """Whether what stays whole at part[begin:end] is math that ends in a period, and a sentence can follow it."""
    if part[end - 1] not in b"$)]":
        return False
    inner = part[max(begin, end - 16) : end].rstrip(b"$)]\\ ")
    return inner[-1:] == b"." and inner[-2:-1] not in b".\\" and _BEGINS.match(part, end) is not None
