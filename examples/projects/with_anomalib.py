"""anomalib: `Ganomaly` on a `Folder` datamodule, trained by an `Engine`, on generated images.

    python examples/projects/with_anomalib.py

What is special:

- Batches are anomalib's own objects, the model is anomalib's own, and in evaluation it returns anomaly scores instead
  of what its loss takes: `step=` calls the parts of it. The losses of anomalib are means; called for one sample after
  the other they give a loss for each.
- The pre-processor, which resizes and normalises, is a callback that changes every batch in place before its step. It
  has done so when CLD calls `step`, too: don't call it again.
- All train images are normal. With `gt_label` for the class the reference are the normal ones of the validation images.
  Don't validate on the test set (`val_split_mode="same_as_test"`).
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import torch
from _checks import Checks, Served, run
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from anomalib.models import Ganomaly
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from lightning_cld import CLDCallback, CoresetDataModule

SIZE = 32


def make_images(root: Path) -> None:
    """Generates stripes of different widths, with a hole in the abnormal ones."""
    draw = np.random.default_rng(0)
    for folder, count in (("good", 40), ("good_test", 16), ("hole", 16)):
        (root / folder).mkdir()
        for number in range(count):
            wave = np.sin(np.arange(SIZE) * draw.uniform(0.3, 1.2))[:, None, None]
            image = 120 + 90 * wave + draw.normal(0, draw.uniform(5, 20), (SIZE, SIZE, 3))
            if folder == "hole":
                image[8:20, 8:20] = 0
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / folder / f"{number:02}.png")


def make_data(root: Path) -> Folder:
    return Folder(
        name="stripes",
        root=root,
        normal_dir="good",
        normal_test_dir="good_test",
        abnormal_dir="hole",
        train_batch_size=8,
        num_workers=0,
        val_split_mode="from_test",
        seed=0,
    )


def make_model() -> Ganomaly:
    half = (0.5, 0.5, 0.5)
    transform = Compose([Resize((SIZE, SIZE)), Normalize(half, half)])
    return Ganomaly(n_features=8, latent_vec_size=16, pre_processor=PreProcessor(transform))


def make_engine(root: Path, epochs: int, *callbacks: L.Callback) -> Engine:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Engine(callbacks=[*callbacks], default_root_dir=root, max_epochs=epochs, accelerator="cpu", **quiet)


def step(module: Ganomaly, batch: ImageBatch) -> tuple[Tensor, Tensor]:
    """What CLD logs: the generator's loss of each image, and whether it is abnormal."""
    images = batch.image
    fake, latent_in, latent_out = module.model.generator(images)
    real_features, fake_features = module.model.discriminator(images)[0], module.model.discriminator(fake)[0]
    parts = (latent_in, latent_out, images, fake, real_features, fake_features)
    losses = [module.generator_loss(*(part[i : i + 1] for part in parts)) for i in range(len(images))]
    return torch.stack(losses), batch.gt_label.int()


def main(checks: Checks, root: Path) -> None:
    make_images(root)

    data, proxy = make_data(root), make_model()
    cld = CLDCallback(step=step, dirpath=root)
    make_engine(root, 4, cld).fit(proxy, datamodule=data)

    def by_hand(split: str, position: int) -> Tensor:
        path = (data.train_data if split == "train" else data.val_data).samples.image_path[position]
        image = (torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
        fake, latent_in, latent_out = proxy.model.generator(image)
        real_features, fake_features = proxy.model.discriminator(image)[0], proxy.model.discriminator(fake)[0]
        encoding = torch.nn.functional.smooth_l1_loss(latent_in, latent_out)
        return (real_features - fake_features).square().mean() + 50 * (image - fake).abs().mean() + encoding

    checks.losses(cld.trajectories, proxy, by_hand)

    coreset = CoresetDataModule(make_data(root), root / "cld-scores.npz", fraction=0.25)
    served = Served(lambda batch: batch.image_path)
    make_engine(root, 1, served).fit(make_model(), datamodule=coreset)
    paths = list(data.train_data.samples.image_path)
    checks.served(served.seen, [paths[position] for position in coreset.indices], of=len(paths))


if __name__ == "__main__":
    run(main)
