"""Adapt a small network to new data: full fine-tuning, LoRA and VeRA, side by side.

    pip install "vera-tools[torch]" scikit-learn peft
    python examples/digits.py

scikit-learn ships 1,797 scanned digits of 8 x 8 pixels. A network is trained on them as they are, and is then to read
them turned by 90 degrees, which it cannot. Three ways to teach it: change every weight; train a LoRA of rank 4 (by
PEFT); train a VeRA of rank 128. Each result is saved, loaded onto the untouched network again, and tested on images
that no training has seen.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from vera_tools import VeraConfig
from vera_tools.nn import VeraModel, load_adapter, save_adapter

LAYERS = ["0", "2", "4"]


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 8, 8) scaled to [0, 1] and labels; the last fifth is for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    cut = len(images) * 4 // 5
    return images[:cut], labels[:cut], images[cut:], labels[cut:]


def network() -> nn.Sequential:
    """Three linear layers of two different shapes, and a head that stays as it is."""
    torch.manual_seed(0)
    linear = [nn.Linear(n_in, n_out) for n_in, n_out in ((64, 128), (128, 128), (128, 128), (128, 10))]
    return nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2], nn.ReLU(), linear[3])


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, lr: float) -> None:
    """Minimise the cross-entropy over shuffled batches of 64."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch].flatten(1)), labels[batch]).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that are read rightly."""
    return (model.eval()(images.flatten(1)).argmax(1) == labels).float().mean().item()


def size(path: Path) -> int:
    """Bytes of a file, or of the weights and the config in a folder."""
    names = ("adapter_model.safetensors", "adapter_config.json")
    return path.stat().st_size if path.is_file() else sum((path / name).stat().st_size for name in names)


def compare(folder: Path, *, epochs: int) -> list[dict[str, Any]]:
    """Train all three ways; one row of figures for each."""
    images, labels, test_images, test_labels = data()
    turned, test_turned = (torch.rot90(i, dims=(1, 2)) for i in (images, test_images))
    base = network()
    train(base, images, labels, epochs=epochs, lr=3e-3)

    def figures(name: str, trained: nn.Module | None, loaded: nn.Module, path: Path | None) -> dict[str, Any]:
        parameters = sum(p.numel() for p in trained.parameters() if p.requires_grad) if trained else 0
        row = {"method": name, "trainable": parameters, "checkpoint_bytes": size(path) if path else 0}
        row["accuracy"] = accuracy(loaded, test_turned, test_labels)
        if trained is not None and row["accuracy"] != accuracy(trained, test_turned, test_labels):
            raise AssertionError(f"{name} does not come back from disk as it was")
        return row

    rows = [figures("no adaptation", None, base, None)]

    full = copy.deepcopy(base)
    train(full, turned, labels, epochs=epochs, lr=3e-3)
    path = folder / "full.safetensors"
    save_file(full.state_dict(), path)
    again = network()
    again.load_state_dict(load_file(path))
    rows.append(figures("full fine-tuning", full, again, path))

    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS))
    train(lora, turned, labels, epochs=epochs, lr=1e-2)
    lora.save_pretrained(folder / "lora")
    rows.append(figures("LoRA", lora, PeftModel.from_pretrained(copy.deepcopy(base), folder / "lora"), folder / "lora"))

    # The projections are regenerated from their key, bit for bit on every machine, so they need not be saved.
    config = VeraConfig(r=128, target_modules=LAYERS, d_initial=0.1, projection_prng_key=42, save_projection=False)
    vera = VeraModel(copy.deepcopy(base), config)
    train(vera, turned, labels, epochs=epochs, lr=5e-2)
    save_adapter(vera, folder / "vera")
    loaded = load_adapter(copy.deepcopy(base), folder / "vera", strict=True)
    rows.append(figures("VeRA", vera, loaded, folder / "vera"))
    return rows


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the products are too small to be worth sharing
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), epochs=args.epochs)
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'':18}{'trainable':>12}{'checkpoint':>14}{'accuracy':>10}")
    for row in rows:
        print(f"{row['method']:18}{row['trainable']:12,d}{row['checkpoint_bytes']:12,d} B{row['accuracy']:10.1%}")


if __name__ == "__main__":
    main()
