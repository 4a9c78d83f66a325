"""`CLDScores.to_csv`: scores as a table, a row for each sample."""

from __future__ import annotations

import csv
import io
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_cld.data.origin import file_names
from lightning_cld.scores import CLDScores, is_cld
from lightning_cld.showing.thumbnails import check_dataset


def make_table(scores: CLDScores, dataset: Dataset[Any] | None) -> str:
    """The table as CSV; see `CLDScores.to_csv`."""
    files = None
    if dataset is not None:
        check_dataset(scores, dataset)
        files = file_names(dataset)
    listed = scores.suspects() if is_cld(scores) else torch.zeros(0, dtype=torch.int64)
    pool = scores.positions()
    pool = pool[torch.argsort(scores.values[pool].nan_to_num(nan=torch.inf), stable=True)]
    pool = torch.cat([listed, pool[~torch.isin(pool, listed)]])
    positions = pool.tolist()
    unscored = scores.values[pool].isnan().tolist()
    suspects = set(listed.tolist())

    columns: dict[str, list[Any]] = {
        "position": positions,
        **({} if scores.names is None else {"name": scores.names[positions]}),
        "class": [""] * len(pool) if scores.classes is None else scores.classes[pool].tolist(),
        # As float32, which are written with as few digits as tell them apart.
        "score": ["" if none else value for value, none in zip(scores.values[pool].numpy(), unscored, strict=True)],
        "suspect": [
            "" if none or not is_cld(scores) else str(position in suspects).lower()
            for position, none in zip(positions, unscored, strict=True)
        ],
    }
    if files is not None:
        columns["file"] = [files[position] for position in positions]
    text = io.StringIO()
    # Its lines end with \r\n. If they ended with \n, older versions of Python would not quote a name that holds \r.
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()
