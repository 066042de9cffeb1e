"""What rules see in a conversation: order of roles, empty answers, leftovers of templates, endless repetition, phrases.

Each function takes `Parts` and gives a value, null where nothing is wrong. The kinds of rules follow open-instruct's data
scripts (AI2, Apache-2.0): repetition by paragraph, sentence and consecutive line with its limits, identity phrases,
knowledge-cutoff phrases, thinking-tag format. Patterns are English, German, French, Spanish, Chinese for identity and
cut-off; others pass unseen.
"""

import re
from collections import Counter

from mixtures.posttrain.parts import TAG, Parts

PARAGRAPH = re.compile(r"\n\s*\n")
SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
LIST_ITEM = re.compile(r"^\s*(?:[-*+•]|\d{1,3}[.)])\s")
FENCED = re.compile(r"^[ ]{0,3}(```+|~~~+)[^\n]*\n(.*?)^[ ]{0,3}\1[ \t]*$", re.DOTALL | re.MULTILINE)
MATHS = re.compile(r"\$[^$\n]+\$|\\\(|\\\[|\\begin\{|\\frac|=")
UNIT_CHARS = 12  # shorter lines and sentences repeat by right: `}`, `Yes.`, `0`
# open-instruct: the limit grows for code and paragraphs of several lines, for maths and for lists, which repeat by nature.
CODE_ALLOWANCE, LINES_ALLOWANCE, MATHS_ALLOWANCE, LIST_ALLOWANCE = 2, 4, 2, 3
LEFTOVER = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_header_id|user|assistant|system|end|begin_of_text|"
    r"begin▁of▁sentence|end▁of▁sentence)\|>|<｜[^｜<>\n]{1,40}｜>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?s>"
    r"|^(?:### ?(?:Instruction|Response|Assistant|Human)):|\{\{ ?(?:user|char|prompt|response) ?\}\}",
    re.MULTILINE,
)
MODELS = r"(?:ChatGPT|GPT-?\d\w*|Claude|Gemini|Bard|Llama|LLaMA|Qwen|DeepSeek\w*|Mistral|Grok|Kimi|Bing Chat|通义千问|文心一言)"
MAKERS = r"(?:OpenAI|Anthropic|Google(?: DeepMind)?|Meta(?: AI)?|Alibaba(?: Cloud)?|DeepSeek|Mistral AI|Microsoft|xAI)"
IDENTITY = re.compile(
    rf"\b(?:I am|I'm|my name is|ich bin|je suis|soy|我是)\s*(?:an? |ein(?:e)? |un(?:e)? )?(?:[\w -]{{0,40}}?\b)?{MODELS}"
    rf"|\b(?:trained|developed|created|made|built|entwickelt|développé|desarrollado)\s+(?:by|von|par|por)\s+{MAKERS}"
    r"|\bas an? (?:AI|artificial intelligence)(?: language)? (?:model|assistant)\b|\bals KI-(?:Sprach)?[Mm]odell\b"
    r"|\ben tant qu['’](?:IA|intelligence artificielle)|\bcomo (?:un )?modelo de lenguaje\b"
    r"|作为(?:一个|一款)?(?:AI|人工智能)(?:语言)?(?:模型|助手)",
    re.IGNORECASE,
)
CUTOFF = re.compile(
    r"\bknowledge[ -]cut-?off\b|\bmy (?:training|knowledge) (?:data )?(?:only )?"
    r"(?:goes|extends|is current|is limited|ends|ended) (?:up )?"
    r"(?:to|until|in|as of)\b|\b(?:as of|up to|until) my (?:last|latest|most recent) (?:knowledge |training )?"
    r"(?:update|training|data)\b"
    r"|\bStand meines (?:letzten )?(?:Wissens|Trainings)|\bma (?:dernière )?mise à jour|\bmi última actualización\b"
    r"|我的(?:知识|训练数据)截[至止]",
    re.IGNORECASE,
)


def role_error(parts: Parts) -> str | None:
    """The first thing wrong with the order of roles: what a chat template would refuse or train on wrongly."""
    roles = parts.roles
    if "user" not in roles:
        return "no_user"
    if "assistant" not in roles:
        return "no_assistant"
    if "system" in roles[1:]:
        return "late_system"
    spoken = [r for r in roles if r != "system"]
    if spoken[0] != "user":
        return "begins_with_" + spoken[0]
    answers = iter(parts.tool_calls)
    called = False
    for before, now in zip(["", *spoken], spoken, strict=False):
        if now == before and now == "user":
            return "repeated_user"
        if now == "assistant" and before == "assistant" and not called:
            return "repeated_assistant"
        if now == "tool" and before == "user":
            return "tool_without_call"
        if now == "assistant":
            called = next(answers)
    return None if spoken[-1] == "assistant" else "ends_with_" + spoken[-1]


def empty_answers(parts: Parts) -> int:
    """Assistant messages that say nothing and call nothing."""
    return sum(not answer and not called for answer, called in zip(parts.answers, parts.tool_calls, strict=True))


def template_error(parts: Parts) -> str | None:
    """`unclosed_think` for thinking tags that do not pair, `leftover` for tokens of a chat template inside a message."""
    for text in parts.raw:
        open_tag = ""
        for match in TAG.finditer(text):
            closing, name = match[1], match[2].lower()
            if bool(closing) != bool(open_tag) or (closing and name != open_tag):
                return "unclosed_think"
            open_tag = "" if closing else name
        if open_tag:
            return "unclosed_think"
    return "leftover" if any(LEFTOVER.search(t) for t in (*parts.raw, *parts.prompts)) else None


def identity(parts: Parts) -> str | None:
    """The phrase in which an answer names itself or its maker."""
    return _phrase(IDENTITY, (*parts.answers, *parts.reasoning))


def cutoff(parts: Parts) -> str | None:
    """The phrase in which an answer speaks of the end of its knowledge."""
    return _phrase(CUTOFF, (*parts.answers, *parts.reasoning))


def _phrase(pattern: re.Pattern[str], texts: tuple[str, ...]) -> str | None:
    return next((m[0][:100] for text in texts if (m := pattern.search(text))), None)


def repetition(parts: Parts) -> tuple[float, float, float]:
    """(paragraph, sentence, consecutive): how often the most repeated one of an assistant message occurs, divided by what its
    kind is allowed: code 2, paragraphs of several lines 4; consecutive lines with maths 2, list items 3. Limits apply to
    these."""
    worst = (0.0, 0.0, 0.0)
    for text in (*parts.raw, *parts.reasoning):
        prose = FENCED.sub("\n\n", text)
        code = [m[2] for m in FENCED.finditer(text)]
        paragraphs = max([_paragraphs(prose, 1), *(_paragraphs(c, CODE_ALLOWANCE) for c in code)])
        units = [u.strip() for u in SENTENCE.split(prose) if len(u.strip()) >= UNIT_CHARS]
        here = (paragraphs, float(max(Counter(units).values(), default=0)), _consecutive(prose))
        worst = tuple(map(max, worst, here))  # type: ignore[assignment]
    return worst


def _paragraphs(text: str, allowance: int) -> float:
    counts = Counter(p.strip() for p in PARAGRAPH.split(text) if len(p.strip()) >= UNIT_CHARS)
    return max((n / (allowance * (LINES_ALLOWANCE if "\n" in p else 1)) for p, n in counts.items()), default=0.0)


def _consecutive(text: str) -> float:
    """Longest run of one line, or of one sentence within a line, divided by its allowance."""
    worst, run, before = 0.0, 0, None
    for unit in (u.strip() for u in SENTENCE.split(text)):
        if not unit:
            continue
        run = run + 1 if unit == before else 1
        before = unit
        allowance = LIST_ALLOWANCE if LIST_ITEM.match(unit) else MATHS_ALLOWANCE if MATHS.search(unit) else 1
        worst = max(worst, run / allowance)
    return worst
