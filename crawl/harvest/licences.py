"""Which licence a repository or package is under, as an SPDX identifier, and whether it is permissive.

In: the text of a licence file, or what a package's metadata says. None means that nothing was recognised: such a change falls
as `license_unknown`, unless the source says the licence itself.
"""

import re

# Licences that ask for attribution at most. Chosen from the OSI list; copyleft of any strength is left out.
_PERMISSIVE_WORDS = """
    MIT MIT-0 X11 Apache-2.0 BSD-2-Clause BSD-3-Clause BSD-4-Clause 0BSD ISC Zlib Unlicense CC0-1.0 BSL-1.0 PSF-2.0
    Python-2.0 PostgreSQL NCSA UPL-1.0 BlueOak-1.0.0 HPND WTFPL AFL-3.0 MulanPSL-2.0
"""
PERMISSIVE = frozenset(_PERMISSIVE_WORDS.split())
LICENCE_FILE = re.compile(r"(?i)^(?:licen[cs]e|copying|unlicense)(?:[-.](?:md|rst|txt|mit|apache|bsd))?$")

# (all of these phrases, SPDX): the first line that fits wins, so narrower ones stand first.
_PHRASES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gnu affero general public license",), "AGPL-3.0-only"),
    (("gnu lesser general public license",), "LGPL-3.0-only"),
    (("gnu general public license", "version 2"), "GPL-2.0-only"),
    (("gnu general public license",), "GPL-3.0-only"),
    (("mozilla public license", "2.0"), "MPL-2.0"),
    (("eclipse public license",), "EPL-2.0"),
    (("apache license", "version 2.0"), "Apache-2.0"),
    (("this is free and unencumbered software",), "Unlicense"),
    (("cc0 1.0 universal",), "CC0-1.0"),
    (("boost software license",), "BSL-1.0"),
    (("python software foundation license",), "PSF-2.0"),
    (("permission is hereby granted, free of charge", "above copyright notice and this permission notice"), "MIT"),
    (("permission to use, copy, modify, and/or distribute", "above copyright notice"), "ISC"),
    (("permission to use, copy, modify, and distribute", "above copyright notice"), "ISC"),
    (("redistribution and use in source and binary forms", "neither the name"), "BSD-3-Clause"),
    (("redistribution and use in source and binary forms", "names of its contributors"), "BSD-3-Clause"),
    (("redistribution and use in source and binary forms",), "BSD-2-Clause"),
    (("'as-is', without any express or implied warranty", "altered source versions"), "Zlib"),
)
# What package metadata writes where SPDX identifiers were not yet asked for.
_NAMES = {
    "mit": "MIT",
    "mit license": "MIT",
    "the mit license": "MIT",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "bsd-3": "BSD-3-Clause",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "psf": "PSF-2.0",
    "psf license": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
    "the unlicense (unlicense)": "Unlicense",
    "public domain": "CC0-1.0",
}
_EXPRESSION = re.compile(r"[A-Za-z0-9.+-]+(?: (?:OR|AND|WITH) [A-Za-z0-9.+-]+)*")


def recognise(text: str) -> str | None:
    """The licence whose wording a licence file bears."""
    plain = " ".join(text.lower().replace("’", "'").replace('"', "'").split())
    return next((spdx for phrases, spdx in _PHRASES if all(p in plain for p in phrases)), None)


def named(value: str) -> str | None:
    """The licence that metadata names: an SPDX expression, or one of the older names."""
    value = value.strip()
    found = _NAMES.get(value.lower())
    if found:
        return found
    return value if _EXPRESSION.fullmatch(value) and value.lower() not in ("unknown", "noassertion", "other") else None


def permissive(expression: str) -> bool:
    """Whether one may choose permissive terms: any side of OR, every side of AND. Exceptions (WITH) only add freedom."""
    plain = expression.replace("(", " ").replace(")", " ")
    choices = [re.split(r"\s+AND\s+", choice.strip()) for choice in re.split(r"\s+OR\s+", plain)]
    return any(all(part.strip().partition(" WITH ")[0] in PERMISSIVE for part in choice) for choice in choices)
