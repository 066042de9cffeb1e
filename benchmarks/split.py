"""The words that datatrove's steps are given in benchmarks: `str.split`.

Its own tokenizers need packages beyond its core (English: spaCy); this one is faster than any of them.
"""

from datatrove.utils.word_tokenizers import WordTokenizer


class Split(WordTokenizer):
    """Words between spaces; datatrove strips punctuation and case before. A sentence ends at `sentence_end`, if given."""

    def __init__(self, sentence_end: str | None = None) -> None:
        super().__init__()
        self.sentence_end = sentence_end

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.split(self.sentence_end) if self.sentence_end else [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]
