"""The page of probable label errors: pictures to review beside the sheet to fill in."""

from collections.abc import Sequence
from dataclasses import dataclass

from biopsy.reporting.html import render


@dataclass(frozen=True)
class LabelIssue:
    """One doubted label.

    Attributes:
        number: Its row in the sheet, from 1.
        patch_id: The patch.
        label: The class it is labelled.
        suggested: The class most witnesses are for.
        reason: What they say.
        around: The patch among those around it, encoded; without coordinates the patch itself.
        patch: The patch by itself, encoded.
    """

    number: int
    patch_id: str
    label: str
    suggested: str
    reason: str
    around: bytes
    patch: bytes


@dataclass(frozen=True)
class LabelIssuesPage:
    """Everything the page says.

    Attributes:
        pack: Name of the pack.
        n_patches: Number of labels checked.
        n_issues: Number of probable label errors.
        doubted: Those on the page.
        colours: Name and colour of each class.
        placed: Whether patches have coordinates.
        sheet: Name of the sheet beside it.
    """

    pack: str
    n_patches: int
    n_issues: int
    doubted: Sequence[LabelIssue]
    colours: Sequence[tuple[str, str]]
    placed: bool
    sheet: str


def render_label_issues(page: LabelIssuesPage) -> str:
    """Write the page as one self-contained HTML file without scripts."""
    return render("label_issues.html", page=page)
