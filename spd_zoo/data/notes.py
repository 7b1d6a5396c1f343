"""Notes on what a command guessed or left out: collected in one place, printed once, and saved with its results."""

from collections.abc import Iterable, Sequence

__all__ = ["Notes", "count", "some"]

NAMED = 5  # number of names in a printed line; files list all


class Notes:
    """The notes of one command, each once, in the order in which they came.

    Args:
        notes: Initial notes.
    """

    def __init__(self, notes: Iterable[str] = ()) -> None:
        self._names: dict[str, list[str]] = {note: [] for note in notes}

    def add(self, note: str, name: str = "") -> None:
        """Adds a note, or one more image that it is about.

        Args:
            note: A sentence, or a description of an image such as "several pages, of which the first is read".
            name: The image, if it is about one.
        """
        names = self._names.setdefault(note, [])
        if name:
            names.append(name)

    def extend(self, notes: Iterable[str]) -> None:
        """Adds several notes."""
        for note in notes:
            self.add(note)

    def lines(self) -> list[str]:
        """One line for each note, with the number of images that it is about and the first of their names."""
        return [
            f"{count(len(names), 'image')}: {note}: {some(names)}" if names else note
            for note, names in self._names.items()
        ]


def some(names: Sequence[str], most: int = NAMED) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def count(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: "1 image", "2 images"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
