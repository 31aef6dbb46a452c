"""Weights in the form that CycleGAN, CUT, SinCUT and SRUNIT publish: `latest_net_G.pth` and friends, a plain state dict."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from infra.errors import UserError

# Checkpoints older than PyTorch 0.4 carry these for instance norms that do not use them.
_LEFTOVERS = ("running_mean", "running_var", "num_batches_tracked")


def load_published(module: nn.Module, path: str | Path) -> None:
    """Load a published checkpoint into a generator, discriminator or heads, by name; a `module.` prefix is dropped.

    Only tensors are read (`weights_only`), so a checkpoint cannot run code. UserError for a file that is missing,
    damaged or of another architecture; the module is then as before.
    """
    state = _read(Path(path))
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.endswith(_LEFTOVERS)}
    own = module.state_dict()
    state = shaped_alike(state, own)
    _check_fit(state, own, Path(path))
    module.load_state_dict(state)


def shaped_alike(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the dimensions of 1 that SinCUT's published weights have and ours lack: (1, C, 1, 1) for a bias of C numbers."""

    def squeezed(value: Tensor) -> list[int]:
        return [side for side in value.shape if side != 1]

    return {
        key: value.reshape(own[key].shape) if key in own and squeezed(value) == squeezed(own[key]) else value
        for key, value in state.items()
    }


def save_published(module: nn.Module, path: str | Path) -> None:
    """Write a module's weights as the published code reads them: contiguous CPU tensors by name. Atomic."""
    # clone: a weight may be a view into a larger buffer, which torch.save would write whole.
    state = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in module.state_dict().items()
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: give the path of a .pth file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file fails in as many ways as there are bytes in it
        raise UserError(
            f"checkpoint {path} is damaged or holds more than tensors (which could run code and is never loaded): "
            "fetch it again, or save it anew with torch.save(network.state_dict(), path)"
        ) from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"checkpoint {path} is not a state dict of one network: give a file such as latest_net_G.pth")
    return state


def _check_fit(state: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> None:
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and state[key].shape != own[key].shape]
    if missing:
        fault = f"it lacks {missing[0]}"
    elif unexpected:
        fault = f"it has {unexpected[0]}, which the network lacks"
    elif reshaped:
        key = reshaped[0]
        fault = f"its {key} is {tuple(state[key].shape)}, the network's {tuple(own[key].shape)}"
    else:
        return
    raise UserError(f"checkpoint {path} does not fit the network: {fault}; {_likely_cause(state, own)}")


def _likely_cause(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    def antialiased(keys: dict[str, Tensor]) -> bool:
        return any(key.endswith(".filt") for key in keys)

    def blocks(keys: dict[str, Tensor]) -> int:
        return sum(key.endswith(".conv_block.1.weight") for key in keys)

    if antialiased(state) != antialiased(own):
        return f"build the network {'with' if antialiased(state) else 'without'} anti-aliasing"
    if blocks(state) != blocks(own):
        return f"build the network with {blocks(state)} residual blocks in place of {blocks(own)}"
    if state.keys() == own.keys():
        return "build the network with the same ngf, ndf or number of channels"
    return "it comes from another kind of network"
