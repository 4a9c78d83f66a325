"""The hyperparameters of a datamodule that LightningCLI made inside another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule


def restore_hyperparameters(datamodule: LightningDataModule) -> None:
    """Gives `datamodule` the hyperparameters that LightningCLI means for it.

    LightningCLI gives the arguments of the outermost datamodule, which is ours, to every datamodule that calls
    `save_hyperparameters()`. Among them is the configuration that the inner datamodule was made from.

    Raises:
        ValueError: If the datamodule may have taken one of our arguments for its own.
    """
    saved = datamodule.hparams
    if "_instantiator" not in saved or "datamodule" not in saved:
        return
    name = type(datamodule).__name__
    config: Any = saved["datamodule"]
    while isinstance(config, Mapping) and config["class_path"].rpartition(".")[2] != name:  # a coreset of a coreset
        config = config.get("init_args", {}).get("datamodule")
    found = isinstance(config, Mapping)
    own = {**config.get("init_args", {}), **config.get("dict_kwargs", {})} if found else {}
    shared = [key for key, value in own.items() if saved.get(key, value) != value]
    if not found or shared:
        also = f", and both have {', '.join(shared)}" if shared else ""
        raise ValueError(
            f"{name} calls save_hyperparameters(), for which LightningCLI gave it the arguments of CoresetDataModule"
            f"{also}. Use LightningCLI(..., load_from_checkpoint_support=False): each class then saves its own."
        )
    own |= {"_class_path": config["class_path"], "_instantiator": saved["_instantiator"]}
    saved.clear()
    datamodule.save_hyperparameters(own, logger=False)
