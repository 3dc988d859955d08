"""What becomes of checked files: quarantine, complete pairs, leaks between splits, the cut into shards. Ray-free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from models.errors import DataError
from pipelines import shards
from pipelines.ingest import Checked, ShardTask
from pipelines.layout import Sample

_SHARD_BYTES = 12 * 1024**2
_MAX_ROWS = 1 << 16


def separate(
    samples: Sequence[Sample], checked: Mapping[str, Checked], duplicates: Sequence[Sample]
) -> tuple[list[Sample], list[dict[str, Any]]]:
    """Good samples, and the rows of the quarantine report (one a file, ordered by path)."""
    again = set(duplicates)
    good, bad = [], {}
    for sample in samples:
        result = checked[sample.path]
        if result.code:
            code, reason = result.code, result.reason
        elif sample in again:
            code, reason = "E_DATA_KEY", f"another file of '{sample.domain}' has the same name, '{sample.key}'"
        else:
            good.append(sample)
            continue
        bad.setdefault(
            sample.path,
            {
                "path": sample.path,
                "domain": sample.domain,
                "split": sample.split,
                "key": sample.key,
                "code": code,
                "reason": reason,
                "bytes": sample.bytes,
            },
        )
    return good, [bad[path] for path in sorted(bad)]


def require_images(samples: Sequence[Sample], domains: Sequence[str], where: str) -> None:
    """Every domain must have something to train on.

    Raises:
        DataError: E_DATA_EMPTY, naming the domain.
    """
    for domain in domains:
        if not any(sample.domain == domain and sample.split == "train" for sample in samples):
            raise DataError(
                f"domain '{domain}' is empty: no usable images for its train split in {where}", code="E_DATA_EMPTY"
            )


def complete_pairs(good: Sequence[Sample], all_samples: Sequence[Sample], where: str) -> tuple[list[Sample], int]:
    """For paired data: samples whose partners are all usable, and how many were dropped for want of one.

    Raises:
        DataError: E_DATA_PAIRS, where the files themselves are not paired.
    """
    by_split: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    domains = sorted({sample.domain for sample in all_samples})
    for sample in all_samples:
        by_split[sample.split][sample.domain].add(sample.key)
    for split, keys in by_split.items():
        first = domains[0]
        for other in domains[1:]:
            lonely = sorted(keys[first] ^ keys[other])
            if lonely:
                has, lacks = (first, other) if lonely[0] in keys[first] else (other, first)
                raise DataError(
                    f"{where}: '{first}' and '{other}' are not paired in {split}: {len(lonely)} of "
                    f"{len(keys[first] | keys[other])} keys are in one only, as '{lonely[0]}' ('{has}', not '{lacks}')",
                    code="E_DATA_PAIRS",
                    hint="give partners the same file name, or use --layout domains",
                )
    there: dict[tuple[str, str], int] = defaultdict(int)
    for sample in good:
        there[sample.split, sample.key] += 1
    kept = [sample for sample in good if there[sample.split, sample.key] == len(domains)]
    return kept, len(good) - len(kept)


def check_content(good: Sequence[Sample], checked: Mapping[str, Checked], lost: Sequence[str]) -> list[str]:
    """Warnings about files that are in two splits, and about splits that are no longer aligned.

    Args:
        good: the samples that are kept; files of side-by-side images belong to both domains, and are not compared.
        checked: the facts of each file.
        lost: splits that were aligned before the unusable files were taken out, and are not now.

    Raises:
        DataError: E_DATA_SAME (two domains hold the same files), E_DATA_LEAK (a whole split lies within another).
    """
    digests: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for sample in good:
        if not sample.half:
            digests[sample.domain][sample.split].add(checked[sample.path].digest)
    whole = {domain: frozenset().union(*splits.values()) for domain, splits in digests.items()}
    names = sorted(whole)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if whole[one] == whole[other]:
                raise DataError(
                    f"domains '{one}' and '{other}' hold the same {len(whole[one]):,} images", code="E_DATA_SAME"
                )
    warnings = []
    for domain in names:
        for split, other in (("test", "train"), ("val", "train"), ("test", "val")):
            common = len(digests[domain][split] & digests[domain][other])
            if common and common == len(digests[domain][split]) and common > 1:
                raise DataError(
                    f"domain '{domain}': all {common:,} images of {split} are in {other} too",
                    code="E_DATA_LEAK",
                    hint="scores on them would mean nothing; give each split its own images",
                )
            if common:
                warnings.append(f"domain '{domain}': {common:,} files of {split} are the same as files of {other}")
    warnings += [
        f"{split}: the domains are no longer aligned, because files could not be used; "
        "--layout paired keeps complete pairs only"
        for split in lost
    ]
    return warnings


def aligned_splits(samples: Sequence[Sample]) -> set[str]:
    """Splits in which all domains have the same keys."""
    keys: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    domains = {sample.domain for sample in samples}
    for sample in samples:
        keys[sample.split][sample.domain].add(sample.key)
    return {
        split
        for split, found in keys.items()
        if len(found) == len(domains) and len({frozenset(names) for names in found.values()}) == 1
    }


def rows_per_shard(samples: Sequence[Sample], checked: Mapping[str, Checked]) -> int:
    """Rows of every shard: about 12 MiB of the domain with the largest images, a multiple of the row group."""
    largest = 0.0
    for domain in {sample.domain for sample in samples}:
        files = [checked[sample.path] for sample in samples if sample.domain == domain]
        measured = [file for file in files if file.stored_bytes]
        pixels = sum(file.height * file.width for file in measured)
        # Files that will be encoded anew are measured by a few of them; with none, a byte and a half a pixel.
        rate = sum(file.stored_bytes for file in measured) / pixels if pixels else 1.5
        mean = sum(file.stored_bytes or rate * file.height * file.width for file in files) / len(files)
        largest = max(largest, mean)
    group = shards.ROW_GROUP
    return max(group, min(_MAX_ROWS, round(_SHARD_BYTES / largest / group) * group))


def plan_shards(samples: Sequence[Sample], rows: int) -> list[ShardTask]:
    """Order each (split, domain) by the hash of its keys and cut it into tasks of `rows` rows."""
    groups: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.split, sample.domain].append(sample)
    tasks = []
    for (split, domain), found in sorted(groups.items()):
        found.sort(key=lambda sample: (shards.key_order(sample.key), sample.key))
        for part, first in enumerate(range(0, len(found), rows)):
            rows_here = found[first : first + rows]
            tasks.append(
                ShardTask(
                    domain=domain,
                    split=split,
                    part=part,
                    keys=[sample.key for sample in rows_here],
                    paths=[sample.path for sample in rows_here],
                    half=rows_here[0].half,
                )
            )
    return tasks


def common_size(samples: Sequence[Sample], checked: Mapping[str, Checked]) -> tuple[int, int] | None:
    """(h, w) where all images have it, else None."""
    sizes = {(checked[sample.path].height, checked[sample.path].width) for sample in samples}
    return sizes.pop() if len(sizes) == 1 else None
