"""Images that came to nothing: why, how many are too many, and a file that lists them for people."""

import io
import logging

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from captioner import storage
from captioner.artifacts.manifests import FileEntry
from captioner.artifacts.output import Output
from captioner.artifacts.tables import RETRYABLE
from captioner.errors import OutOfReachError, SourceError

logger = logging.getLogger(__name__)

REJECTS = "rejects.csv"
_REASONS_SHOWN = 5


def report_rejects(
    output: Output, failed: pa.Table, total: int, max_reject_fraction: float
) -> list[FileEntry]:
    """Say why images were rejected, and list them in ``rejects.csv``, where there are any.

    Args:
        failed: image_id, uri, error and error_kind of images without a result; also of those that could not be read,
            which somebody has accepted.
        total: how many images there are.

    Raises:
        SourceError: more than ``max_reject_fraction`` of all were rejected.
        OutOfReachError: there is nothing but rejected and unreadable images, and that fraction is below 1.
    """
    if not len(failed):
        storage.delete(output.uri(REJECTS))  # of a run whose pictures could not be read then
        return []
    file = io.BytesIO()
    pyarrow.csv.write_csv(failed.sort_by("image_id"), file)
    entry = output.write(REJECTS, file.getvalue())
    reasons = _reasons(failed)
    for reason in reasons:
        logger.info("  %s", reason)
    unreadable = pc.sum(pc.equal(failed["error_kind"], RETRYABLE)).as_py() or 0
    rejected = len(failed) - unreadable
    if len(failed) == total and unreadable and max_reject_fraction < 1:
        raise OutOfReachError(
            f"none of {total:,} images has a result, and {unreadable:,} could not be read: {reasons[0]}; the same "
            "command tries these again"
        )
    if rejected > max_reject_fraction * total:
        raise SourceError(
            f"{rejected:,} of {total:,} images were rejected, more than max-reject-fraction "
            f"{max_reject_fraction:g}: {reasons[0]}; {output.uri(REJECTS)} lists them; a larger --max-reject-fraction "
            "publishes without them, --restart begins anew"
        )
    return [entry]


def _reasons(failed: pa.Table) -> list[str]:
    """The commonest reasons, with an image each."""
    counted = failed.group_by(["error", "error_kind"]).aggregate(
        [([], "count_all"), ("image_id", "min")]
    )
    common = counted.sort_by([("count_all", "descending"), ("error", "ascending")])
    return [
        f"{row['count_all']:,} {_called(row['error_kind'])}: {row['error']} ({row['image_id_min']})"
        for row in common.slice(0, _REASONS_SHOWN).to_pylist()
    ]


def _called(kind: str) -> str:
    return "unreadable" if kind == RETRYABLE else "rejected"
