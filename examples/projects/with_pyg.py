"""PyTorch Geometric: graph classification with a `LightningDataset`, on generated graphs.

    python examples/projects/with_pyg.py

What is special:

- Batches are `Batch` objects: `cld_step` on your LightningModule says what the loss is. One sample is one graph.
- The coreset's loader is PyTorch Geometric's own again, with your `follow_batch` and `exclude_keys`.
- In one large graph (`LightningNodeData` with a neighbor loader) a sample is a seed node: `cld_step` returns the losses
  and classes of a batch's first `batch.batch_size` nodes, and positions are those in `input_train_nodes`. The loader is
  made from nodes, not from a dataset: the coreset is `input_train_nodes=train_nodes[scores.select(...)]`.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from _checks import Checks, Served, quiet_trainer, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch, Data, InMemoryDataset
from torch_geometric.data.lightning import LightningDataset
from torch_geometric.nn import GINConv, global_add_pool
from torch_geometric.utils import erdos_renyi_graph

from lightning_cld import CLDCallback, CoresetDataModule


class Graphs(InMemoryDataset):
    """Random graphs, sparse ones (class 0) and dense ones (class 1); `number` tells them apart."""

    def __init__(self, numbers: range, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        graphs = []
        for number in numbers:
            label, nodes = number % 2, int(torch.randint(5, 15, ()))
            edges = erdos_renyi_graph(nodes, 0.3 + 0.2 * label)
            graphs.append(Data(x=torch.randn(nodes, 4), edge_index=edges, y=torch.tensor([label]), number=number))
        self.data, self.slices = self.collate(graphs)


class GraphClassifier(L.LightningModule):
    """One round of messages, then the sum over a graph's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = GINConv(nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16)))
        self.head = nn.Linear(16, 2)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(global_add_pool(self.conv(batch.x, batch.edge_index), batch.batch))

    def cld_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What CLD logs: a loss for each graph, and its class."""
        return F.cross_entropy(self(batch), batch.y, reduction="none"), batch.y

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), batch.y)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch), batch.y), batch_size=batch.num_graphs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def make_data() -> LightningDataset:
    # Pinned memory, PyTorch Geometric's default, is for a GPU.
    return LightningDataset(Graphs(range(60), seed=0), Graphs(range(60, 80), seed=1), batch_size=8, pin_memory=False)


def main(checks: Checks, root: Path) -> None:
    data, proxy = make_data(), GraphClassifier()
    cld = CLDCallback(dirpath=root)
    quiet_trainer(4, cld).fit(proxy, datamodule=data)

    def by_hand(split: str, position: int) -> Tensor:
        graph = (data.train_dataset if split == "train" else data.val_dataset)[position]
        hidden = proxy.conv(graph.x, graph.edge_index).sum(0)
        return F.cross_entropy(proxy.head(hidden), graph.y[0])

    checks.losses(cld.trajectories, proxy, by_hand)

    coreset = CoresetDataModule(make_data(), root / "cld-scores.npz", fraction=0.25)
    served = Served(lambda batch: batch.number.tolist())
    quiet_trainer(1, served).fit(GraphClassifier(), datamodule=coreset)
    checks.served(served.seen, coreset.indices, of=60)  # a graph's number is its position


if __name__ == "__main__":
    run(main)
