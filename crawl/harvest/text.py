"""What people wrote around a change, made fit to read: reply quotations off, long comments cut, names masked.

In: Markdown of titles, bodies and comments as forges return it. Out: the same text shorter. Rules of StarCoder's issues (arXiv
2305.06161, section 3.3): e-mail replies lose what they quote; a comment of more than 80 lines keeps its first 60 and last 20;
user names are masked.
"""

import re
from collections.abc import Iterable

COMMENT_LINES, FIRST_LINES, LAST_LINES = 80, 60, 20
CUT = "[...]"

_REPLY = re.compile(
    r"(?m)^(?:On .{4,160}\n?.{0,80}(?:wrote|writes):\s*$|-{2,} ?Original Message ?-{2,}.*$|_{20,}\s*$"
    r"|(?:— ?|-- ?)?\n?(?:Reply to this email directly|You are receiving this because).*$)"
)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_TRAILER = re.compile(
    r"(?mi)^(?:co-authored-by|signed-off-by|reviewed-by|acked-by|tested-by|reported-by|change-id):.*\n?"
)
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
_MENTION = re.compile(r"(?<![\w/.@])@([A-Za-z0-9](?:[A-Za-z0-9-]{0,38}))(?![\w/-])")
_MAIL = re.compile(r"<?(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+>?")

# StarCoder's list and rule for bots, and CI accounts seen in GitHub's own documentation.
_BOT_PARTS = ("[bot]", "jenkins", "travis", "k8s-", "dependabot", "renovate", "codecov", "coveralls", "netlify")
_BOT_ENDS = ("bot", "-ci", "-automation", "-robot", "-machine", "-github-actions")


def is_bot(login: str) -> bool:
    """Whether an account's name is that of a machine."""
    name = login.lower()
    return any(part in name for part in _BOT_PARTS) or name.endswith(_BOT_ENDS)


def cleaned(text: str) -> str:
    """A body or comment with line ends as LF, without HTML comments, quoted e-mail and commit trailers, and not too
    long."""
    plain = without_comments(text.replace("\r\n", "\n").replace("\r", "\n"))
    return trimmed(_TRAILER.sub("", without_reply(plain)).strip())


def without_comments(text: str) -> str:
    """The text without HTML comments; one that is never closed stays. Behind the last mark that closes one nothing is
    looked for, or thousands of opening marks would each be sought an end for."""
    end = text.rfind("-->") + 3
    return _COMMENT.sub("", text[:end]) + text[end:] if end > 2 else text


def without_reply(text: str) -> str:
    """The text above the first line with which mail programs begin what they quote; a text that begins with it stays
    as it is, less its quoted lines."""
    found = _REPLY.search(text)
    if found is None:
        return text
    above = text[: found.start()].strip()
    if above:
        return above
    below = text[found.end() :].split("\n")
    return "\n".join(line for line in below if not line.startswith(">")).strip()


def trimmed(text: str) -> str:
    """More than 80 lines: the first 60, a mark, the last 20."""
    lines = text.split("\n")
    if len(lines) <= COMMENT_LINES:
        return text
    return "\n".join([*lines[:FIRST_LINES], CUT, *lines[-LAST_LINES:]])


class Masks:
    """Names of one change's people as `user1`, `user2`, in the order in which they first speak."""

    def __init__(self, logins: Iterable[str]) -> None:
        self._names: dict[str, str] = {}
        for login in logins:
            if login and login.lower() not in self._names:
                self._names[login.lower()] = f"user{len(self._names) + 1}"
        words = sorted((n for n in self._names if len(n) > 2), key=len, reverse=True)
        wanted = "|".join(map(re.escape, words))
        self._known = re.compile(rf"(?i)(?<![\w-]){'@?(' + wanted + ')'}(?![\w-])") if words else None

    def name(self, login: str | None) -> str:
        """The mask of one person; someone unknown, such as a deleted account, is `user`."""
        return self._names.get((login or "").lower(), "user")

    def text(self, text: str) -> str:
        """Mentions and mail addresses masked; code keeps its `@decorators`."""
        return "".join(part if i % 2 else self._prose(part) for i, part in enumerate(_CODE.split(text)))

    def _prose(self, text: str) -> str:
        text = _MAIL.sub("<email>", text)
        if self._known is not None:
            text = self._known.sub(lambda m: self._at(m.group(0), self.name(m.group(1))), text)
        return _MENTION.sub(lambda m: m.group(0) if _MASK.fullmatch(m.group(1)) else "@user", text)

    @staticmethod
    def _at(found: str, mask: str) -> str:
        return f"@{mask}" if found.startswith("@") else mask


_MASK = re.compile(r"user\d*")
