"""Normalisation of ids and names, and plurals.

All names from outside (archives, folders, tables, lists of cases, options) are normalised by `normalize_name`
or `normalize_id`, so that different spellings of a patient are the same patient.
"""

import re
import unicodedata
from collections.abc import Iterable

_INTEGER = re.compile(r"(\d+)\.0+")
_CLASS_TITLES = {"idc": "IDC", "non_idc": "non-IDC"}
_QUOTED = re.compile(r'=?"(.*)"')  # ="0012", as some programs write text for spreadsheets
_BEFORE_DIGITS = re.compile(r"(?<=[^\W\d])-(?=\d)|(?<=\d)-(?=[^\W\d])")  # P-01, or 01-A
_SCIENTIFIC = re.compile(r"\d(\.\d+)?e\+?\d{1,2}")


def normalize_name(name: str) -> str:
    r"""Return a normalised name or path.

    Backslashes become slashes, Unicode is composed (NFC), white space is collapsed to one space and stripped
    from each part, invisible characters (of format) are removed. Bytes that are not UTF-8 (surrogates of
    `os.fsdecode`) and control characters are written as ``%FC``.

    Example:
        >>> normalize_name("data\\benign \\M\udcfcller\u00a01.png")
        'data/benign/M%FCller 1.png'
    """
    if name.isascii() and name.isprintable() and " " not in name and "\\" not in name:
        return name
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    name = "".join(char for char in name if unicodedata.category(char) != "Cf")
    name = "/".join(" ".join(part.split()) for part in name.split("/"))
    return printable(name)


def normalize_path(name: str) -> str:
    r"""Return a normalised relative path: as `normalize_name`, without empty parts and ``.``.

    Example:
        >>> normalize_path(".\\data//benign/./1.png")
        'data/benign/1.png'
    """
    name = normalize_name(name)
    if "//" not in name and "./" not in name and name[:1] != "/":
        return name
    kept = [part for part in name.split("/")[:-1] if part not in ("", ".")]
    return "/".join([*kept, name.rpartition("/")[2]])


def printable(text: str) -> str:
    r"""Return text with escaped control characters and surrogates, for paths in reports.

    Example:
        >>> printable("a\\M\udcfcller")
        'a\\M%FCller'
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_escape, text))


def file_name(text: str) -> str:
    """Return a valid file name for an id or layer name.

    Example:
        >>> file_name("body.conv/1 a")
        'body.conv_1_a'
    """
    return re.sub(r"[^\w.-]", "_", text)[:120]


def class_title(name: str) -> str:
    """Return a class name as texts, tables and figures show it; files keep the name itself.

    Example:
        >>> class_title("non_idc"), class_title("ductal_carcinoma"), class_title("1"), class_title("Tumor")
        ('non-IDC', 'ductal carcinoma', 'class 1', 'Tumor')
    """
    if name in _CLASS_TITLES:
        return _CLASS_TITLES[name]
    return f"class {name}" if name.isdecimal() else name.replace("_", " ").strip() or name


def plural(noun: str) -> str:
    """Return the plural of a regular noun.

    Example:
        >>> plural("patient"), plural("patch"), plural("class")
        ('patients', 'patches', 'classes')
    """
    return noun + ("es" if noun.endswith(("ch", "s", "x")) else "s")


def capitalize(text: str) -> str:
    """Return a text with its first letter in upper case.

    Example:
        >>> capitalize("macro AUROC")
        'Macro AUROC'
    """
    return text[:1].upper() + text[1:]


def count(n: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> count(1, "patient"), count(8151, "patch")
        ('1 patient', '8,151 patches')
    """
    return f"{n:,} {noun if n == 1 else plural(noun)}"


def count_patches(n_patches: int, n_groups: int, unit: str) -> str:
    """Return numbers of patches and of the patients or slides they are from.

    Example:
        >>> count_patches(8151, 14, "patient"), count_patches(20, 20, "patch")
        ('8,151 patches of 14 patients', '20 patches')
    """
    return count(n_patches, "patch") + ("" if unit == "patch" else f" of {count(n_groups, unit)}")


def normalize_id(text: object) -> str:
    """Return a normalised id: as `normalize_name`, without quotes, and ``12.0`` of a spreadsheet as ``12``.

    Example:
        >>> normalize_id(" P01\u00a0"), normalize_id("12.0"), normalize_id('="007"'), normalize_id("  ")
        ('P01', '12', '007', '')
    """
    name = normalize_name(str(text))
    if quoted := _QUOTED.fullmatch(name):
        name = quoted[1].strip()
    match = _INTEGER.fullmatch(name)
    return match[1] if match else name


def find_lookalikes(ids: Iterable[str]) -> list[list[str]]:
    """Return groups of ids that are probably the same: `fold_id` maps them to one form.

    Example:
        >>> find_lookalikes(["p1", "P1", "07", "7", "8"])
        [['07', '7'], ['P1', 'p1']]
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(set(ids)):
        groups.setdefault(fold_id(name), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def fold_id(name: str) -> str:
    """Return a key that is equal for ids that may be one.

    They differ by letter case, leading zeros, the kind of dash, space and underscore, one of them between
    letters and digits, full-width letters, a leading apostrophe, or by what a spreadsheet makes of a number
    (``1E+05``, ``1,0``).
    """
    name = unicodedata.normalize("NFKC", name).casefold().lstrip("'")
    name = "".join("-" if unicodedata.category(char) == "Pd" or char == "\u2212" else char for char in name)
    name = _BEFORE_DIGITS.sub("", re.sub(r"(?<=\w)[\s_-]+(?=\w)", "-", name))
    if _SCIENTIFIC.fullmatch(name):
        name = f"{float(name):.0f}"
    return re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"^(\d+)[.,]0+$", r"\1", name))


def list_unmatched(names: Iterable[str], known: Iterable[str], *, most: int = 3) -> str:
    """Return a text of the first unmatched names, each with a known name it may be a misspelling of.

    Example:
        >>> list_unmatched(["3", "x", "y", "z"], ["03", "04"])
        "'3' (perhaps '03'), 'x', 'y' and 1 more"
    """
    names = list(names)
    likely = {fold_id(name): name for name in known}
    listed = [
        repr(name) + (f" (perhaps {likely[fold_id(name)]!r})" if fold_id(name) in likely else "")
        for name in names[:most]
    ]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(listed) + more


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"%{code - 0xDC00:02X}"
    if 0xD800 <= code <= 0xDFFF or not (char.isprintable() or char == " "):
        return f"%{code:02X}"
    return char
