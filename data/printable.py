"""Text of models, files and people as a terminal may show it: control characters are escaped."""

# All but newline and tab; DEL and the eight-bit ones; what turns the direction of writing; and
# halves of surrogates, which no encoding has.
_CODES = (
    *(code for code in range(0x20) if chr(code) not in "\n\t"), *range(0x7F, 0xA0),
    *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000),
)
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CODES}


def printable(text: str) -> str:
    """The text with every control character but newline and tab as a Python escape, such as \\x1b."""
    return text.translate(_ESCAPES)
