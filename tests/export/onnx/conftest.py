"""What tests of ONNX graphs share: onnxruntime, held against our own logits."""

import numpy as np
import pytest
import torch

from fewbits import api


@pytest.fixture
def graph_session():
    """Opens the graph of a folder in onnxruntime, one thread."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'fewbits[onnx]'")

    def opened(folder):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        # Else inputs of 4-bit layers behind DequantizeLinear are rounded to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    return opened


def run(opened, ids, past=None, mask=None):
    """What a graph gives for `ids [batch, tokens]` after the tokens whose keys and values are `past`."""
    states = [one for one in opened.get_inputs() if one.name.startswith("past_key_values.")]
    past = past or [np.zeros((len(ids), one.shape[1], 0, one.shape[3]), np.float32) for one in states]
    seen = past[0].shape[2]
    mask = np.ones((len(ids), seen + ids.shape[1]), np.int64) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clip(0)[:, seen:]
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return opened.run(None, given | {one.name: state for one, state in zip(states, past, strict=True)})


def distance(theirs, ours):
    return np.linalg.norm(theirs - ours) / np.linalg.norm(ours)


@pytest.fixture
def assert_graph_is(graph_session):
    """The graph in the folder `out` gives the logits of `folder`: in one call and in two, padded, and token after token."""

    def check(folder, out):
        ours, opened = api.load(folder), graph_session(out)
        ids = torch.randint(64, (3, 14), generator=torch.Generator().manual_seed(0))
        mask = torch.ones(3, 14, dtype=torch.int64)
        mask[1, :4] = 0
        with torch.no_grad():
            logits = ours(ids).logits.numpy()
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            padded = ours(ids, attention_mask=mask, position_ids=positions).logits.numpy()
        assert distance(run(opened, ids.numpy())[0], logits) < 1e-5
        seen = mask.numpy().astype(bool)
        assert distance(run(opened, ids.numpy(), mask=mask.numpy())[0][seen], padded[seen]) < 1e-5
        _, *past = run(opened, ids.numpy()[:, :9])
        for place in range(9, 14):
            scores, *past = run(opened, ids.numpy()[:, place : place + 1], past)
            assert distance(scores, logits[:, place : place + 1]) < 1e-5

    return check
