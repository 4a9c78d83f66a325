"""transformers and datasets: a sequence classifier, made from a configuration, on generated sentences.

    python examples/projects/with_transformers.py

What is special:

- Batches are dictionaries and the model returns an object with `logits`: `cld_step` on your LightningModule says what
  the loss is. It needs one loss a sample, and so not the `loss` that the model returns.
- A `datasets.Dataset` is a map-style dataset, and `DataCollatorWithPadding` is kept: the callback's and the coreset's
  batches are padded as yours are. For an `IterableDataset` (`streaming=True`) see `with_streaming.py`.
- Positions are those of the dataset that the loader has. `filter`, `shuffle` and `train_test_split` give others: seed
  them, so that the target's run makes the same dataset as the proxy's.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import torch
from _checks import Checks, Served, quiet_trainer, run
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from lightning_cld import CLDCallback, CoresetDataModule

WORDS = ("fish", "boat", "wave", "salt", "hill", "goat", "snow", "pine")
NUMBERS = [f"no{number}" for number in range(80)]


def make_sentences(numbers: list[str], seed: int) -> Dataset:
    """Sentences of different lengths about the sea or the mountains, each of which begins with its number."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, len(numbers))
    often = [np.repeat(WORDS, [3] * 4 + [1] * 4), np.repeat(WORDS, [1] * 4 + [3] * 4)]
    texts = [
        " ".join([number, *draw.choice(often[label], draw.integers(3, 12))])
        for number, label in zip(numbers, labels, strict=True)
    ]
    return Dataset.from_dict({"text": texts, "label": labels.tolist()})


class Sentences(L.LightningDataModule):
    """60 sentences to train on and 20 for the reference, tokenised."""

    def __init__(self) -> None:
        super().__init__()
        words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *WORDS, *NUMBERS])}
        model = Tokenizer(WordLevel(words, unk_token="[UNK]"))
        model.pre_tokenizer = WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")

    def setup(self, stage: str) -> None:
        self.train, self.val = (
            make_sentences(numbers, seed=0).map(lambda row: self.tokenizer(row["text"]), remove_columns=["text"])
            for numbers in (NUMBERS[:60], NUMBERS[60:])
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 8, shuffle=True, collate_fn=DataCollatorWithPadding(self.tokenizer))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 8, collate_fn=DataCollatorWithPadding(self.tokenizer))


class FineTuning(L.LightningModule):
    """Trains a classifier of transformers by the loss that it returns."""

    def __init__(self, words: int) -> None:
        super().__init__()
        layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = BertConfig(vocab_size=words, max_position_embeddings=16, num_labels=2, **layers)
        self.model = AutoModelForSequenceClassification.from_config(config)  # or from_pretrained(...)

    def cld_step(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What CLD logs: a loss for each sample, and its class."""
        return F.cross_entropy(self.model(**batch).logits, batch["labels"], reduction="none"), batch["labels"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(checks: Checks, root: Path) -> None:
    disable_progress_bars()

    data = Sentences()
    proxy = FineTuning(len(data.tokenizer))
    cld = CLDCallback(dirpath=root)
    quiet_trainer(4, cld).fit(proxy, datamodule=data)

    def by_hand(split: str, position: int) -> Tensor:
        row = getattr(data, split)[position]
        return proxy.model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["label"]])).loss

    checks.losses(cld.trajectories, proxy, by_hand)

    coreset = CoresetDataModule(Sentences(), root / "cld-scores.npz", fraction=0.25)
    served = Served(lambda batch: data.tokenizer.convert_ids_to_tokens(batch["input_ids"][:, 0].tolist()))
    quiet_trainer(1, served).fit(FineTuning(len(data.tokenizer)), datamodule=coreset)
    checks.served(served.seen, [NUMBERS[position] for position in coreset.indices], of=60)


if __name__ == "__main__":
    run(main)
