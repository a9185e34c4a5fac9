"""Files that cannot be read are skipped, counted and named, up to a limit.

Only files that are missing or damaged count (``UnreadableError``). A label map of another size or
with values that are no class stops a run at once, as the data or the config are wrong then.

``ReadableDataset`` skips them in the data loading processes and adds the reason to the sample;
``ReadableBatches`` collects the reasons in the training process, and the training processes share
them. So what a run has skipped depends only on the batches that it has seen, not on how many
processes have loaded ahead.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from detectron2.data import DatasetFromList
from detectron2.utils import comm
from torch.utils.data import Dataset

from semask.data.reading import read_label
from semask.errors import DataError, UnreadableError

logger = logging.getLogger(__name__)

# Entry of a sample: what has been skipped for it, as {file: reason}.
SKIPPED = "skipped_files"

Mapper = Callable[[dict[str, Any]], dict[str, Any]]


class UnreadableFiles:
    """The files that a run has skipped so far, as known to this process.

    Attributes:
        limit, what: see the constructor.
        reasons: why each file was skipped, by name.
        pending: those not yet shared with the other processes.
    """

    def __init__(self, limit: int, what: str = "the training data") -> None:
        """
        Args:
            limit: number of different files that may be skipped (DATALOADER.MAX_UNREADABLE).
            what: the source of the files, for messages.
        """
        self.limit = limit
        self.what = what
        self.reasons: dict[str, str] = {}
        self.pending: dict[str, str] = {}

    def add(self, file: str, reason: str) -> None:
        """Note a skipped file; the same one again counts once.

        Raises:
            DataError: there are more than the limit; it names them.
        """
        if file in self.reasons:
            return
        self.reasons[file] = self.pending[file] = reason
        logger.warning("Skipped (%d of at most %d): %s", len(self.reasons), self.limit, reason)
        self._check()

    def sync(self) -> None:
        """Share the new files between the processes of a run, all of which call it.

        Raises:
            DataError: together they have skipped more than the limit; raised in each of them.
        """
        for pending in comm.all_gather(self.pending):
            self.reasons = {**pending, **self.reasons}
        self.pending = {}
        self._check()

    def _check(self) -> None:
        if len(self.reasons) > self.limit:
            raise DataError(_too_many(self.reasons, self.limit, self.what))


class ReadableDataset(Dataset[dict[str, Any]]):
    """Maps dataset dicts to samples, except those whose files cannot be read."""

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Mapper,
        limit: int,
        *,
        replace: bool = True,
    ) -> None:
        """
        Args:
            records: dataset dicts.
            mapper: turns one into a sample; it may not draw random numbers before it has read the
                files.
            limit: see ``UnreadableFiles``; with 0 the first unreadable file is an error.
            replace: return the next image instead of one that cannot be read (training); otherwise
                a sample of nothing but what was skipped (evaluation, where the label map has to be
                readable too).
        """
        self._records = DatasetFromList(list(records), copy=False)
        self._mapper = mapper
        self._limit = limit
        self._replace = replace

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Returns:
            The mapper's sample, with ``SKIPPED`` if files were skipped.

        Raises:
            DataError: more files in a row than the limit cannot be read, or another mistake.
        """
        skipped: dict[str, str] = {}
        for offset in range(len(self)):
            record = self._records[(index + offset) % len(self)]
            try:
                sample = self._sample(record)
            except UnreadableError as error:
                if self._limit == 0:
                    raise
                skipped[record["file_name"]] = str(error)
                if not self._replace:
                    return {SKIPPED: skipped}
                if len(skipped) > self._limit:
                    break
            else:
                return {**sample, SKIPPED: skipped} if skipped else sample
        raise DataError(_too_many(skipped, self._limit, "the training data"))

    def _sample(self, record: dict[str, Any]) -> dict[str, Any]:
        if not self._replace and "sem_seg_file_name" in record:
            read_label(record["sem_seg_file_name"], record.get("label_map"))
        return self._mapper(record)


class ReadableBatches:
    """The batches of a data loader over a ``ReadableDataset``; notes the skipped files."""

    def __init__(self, loader: Iterable[list[dict[str, Any]]], unreadable: UnreadableFiles) -> None:
        """
        Args:
            loader: gives lists of samples.
            unreadable: where to note what was skipped; kept as the attribute of that name.
        """
        self.loader = loader
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # where the loader has a length

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """
        Raises:
            DataError: more files than the limit cannot be read.
        """
        # An evaluation ends, in all processes together; the stream of training batches does not.
        for batch in self.loader:
            for sample in batch:
                for file, reason in sample.pop(SKIPPED, {}).items():
                    self.unreadable.add(file, reason)
            readable = [sample for sample in batch if sample]
            if readable:
                yield readable
        self.unreadable.sync()
        if self.unreadable.reasons:
            logger.warning(
                "%d files of %s could not be read and are not in the result:\n%s",
                len(self.unreadable.reasons),
                self.unreadable.what,
                "\n".join(f"    {reason}" for reason in self.unreadable.reasons.values()),
            )


def _too_many(reasons: dict[str, str], limit: int, what: str, shown: int = 20) -> str:
    listed = list(reasons.values())[:shown]
    if len(reasons) > shown:
        listed.append(f"and {len(reasons) - shown} more")
    if len(reasons) > limit:
        allowed = f", and DATALOADER.MAX_UNREADABLE allows {limit}"
    else:
        allowed = ", and there are no others"
    return (
        f"{len(reasons)} files of {what} cannot be read{allowed}:\n"
        + "\n".join(f"    {reason}" for reason in listed)
        + "\nRepair or remove them; `semask check` finds all."
    )
