"""Checkpoints of tests/fixtures to read, to spoil and to compare."""

import json

import safetensors.numpy


def stored(directory):
    """All tensors of a checkpoint, {name: array}."""
    return {name: tensor for file in directory.glob("*.safetensors")
            for name, tensor in safetensors.numpy.load_file(file).items()}


def assert_same_bits(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape, name
        assert tensors[name].tobytes() == tensor.tobytes(), name


def edit(directory, name="config.json", remove=(), **entries):
    """Changes entries of a JSON file."""
    path = directory / name
    table = (json.loads(path.read_text()) if path.exists() else {}) | entries
    path.write_text(json.dumps({key: value for key, value in table.items() if key not in remove}))


def rewrite(directory, change):
    """Weights with one change, in one file."""
    tensors = stored(directory)
    change(tensors)
    for file in directory.glob("model*"):
        file.unlink()
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
