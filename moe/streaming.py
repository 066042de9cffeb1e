"""Text of an answer while its tokens arrive.

In: token ids, one after the other. Out: pieces of text, whose sum is the decoded answer up to the first stop string.
Held back: bytes that may be the beginning of a character, and text that may be the beginning of a stop string. What is
released does not depend on where token borders fall.
"""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character, or not yet
MOST_UNFINISHED = 3  # bytes of a UTF-8 character that lacks its last
WINDOW = 12  # tokens behind the border before it moves into bytes that are no text: some borders of these are between characters


class TextStream:
    """`decode` turns ids into text; `stop` are strings that end the answer and are not part of it."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decode, tuple(stop)
        self.stopped = False
        self._ids: list[int] = []  # since the last border between two whole characters but one
        self._border = 0  # of these, ids whose text is released; they stay as context for decoders that need it
        self._released = 0  # characters released of the ids behind the border
        self._held = ""

    def push(self, token: int) -> str:
        """Takes a token and returns the text that is now certain. Nothing comes after `stopped`."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self.decode(self._ids)[len(self.decode(self._ids[: self._border])) :]
        unfinished = text.endswith(UNFINISHED)
        certain = self._certain(text)
        new, self._released = certain[self._released :], len(certain)
        if not unfinished:
            self._move(len(self._ids), len(text))
        elif len(self._ids) - self._border > WINDOW:
            self._settle(text)
        return self._search(new)

    def end(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        text = self.decode(self._ids)[len(self.decode(self._ids[: self._border])) :]
        released = self._search(text[self._released :])
        rest, self._held = ("" if self.stopped else self._held), ""
        return released + rest

    def _move(self, end: int, chars: int) -> None:
        """Puts the border before id `end`, which is `chars` characters further on."""
        self._ids, self._border, self._released = self._ids[self._border :], end - self._border, self._released - chars

    def _settle(self, text: str) -> None:
        """Moves the border past bytes that will never be a character, so that a run of them is not decoded anew each time."""
        done = len(self.decode(self._ids[: self._border]))
        for end in range(len(self._ids) - MOST_UNFINISHED - 1, self._border, -1):
            before = self.decode(self._ids[:end])[done:]
            inside = self.decode(self._ids[self._border : end])
            after = self.decode(self._ids[self._border :])[len(inside) :]
            if before + after == text and len(before) <= self._released:  # not where the border would part a character
                self._move(end, len(before))
                return

    @staticmethod
    def _certain(text: str) -> str:
        for _ in range(MOST_UNFINISHED):
            text = text.removesuffix(UNFINISHED)
        return text

    def _search(self, new: str) -> str:
        """Adds text, looks for a stop string, and releases what cannot begin one."""
        text = self._held + new
        found = [(begin + len(s), begin) for s in self.stop if (begin := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]  # the one that ends first, so that token borders do not matter
        keep = max((n for s in self.stop for n in range(min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
