"""The one alphabet: every array and every parameter carries its shape as a suffix of its name."""

ALPHABET = {
    "B": "batch",
    "T": "query time",
    "S": "key time",
    "D": "model",
    "N": "query heads",
    "K": "key/value heads",
    "G": "query heads per key/value head, N / K",
    "H": "head dim",
    "F": "feed-forward",
    "V": "vocabulary",
    "L": "layers",
    "E": "experts",
    "C": "experts chosen by a token",
    "R": "low rank",
    "P": "features: patches, token types, buckets of distance",
    "Y": "classes that a head tells apart",
}


def check_letters(letters: str) -> str:
    """Returns `letters` unchanged; a ValueError names any that the alphabet does not have."""
    unknown = [letter for letter in letters if letter not in ALPHABET]
    if unknown:
        raise ValueError(f"letters {letters!r}: {unknown} not in the alphabet {list(ALPHABET)}")
    return letters
