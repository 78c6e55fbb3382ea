"""The loss on held-out text, a token and a byte."""

import math

import torch
from torch import nn

from fastllama.config import Config
from fastllama.data.batch import IGNORED, fill_batch
from fastllama.data.packing import Packing
from fastllama.data.stream import TokenStream
from fastllama.data.text_bytes import TextBytes
from fastllama.distributed.world import World
from fastllama.errors import SideJobFailedError


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    stream: TokenStream,
    text_bytes: TextBytes,
    config: Config,
    world: World,
    packing: Packing | None = None,
) -> tuple[float, float]:
    """Mean negative log-likelihood over the first `eval_tokens` of the stream.

    Sequences come in the order of the stream. Every rank computes batches of one shape; the targets
    of rows past the end are ignored. `packing` keeps documents apart, as in training.

    Returns:
        Nats a token, and bits a UTF-8 byte of the text that these tokens stand for; NaN if they
        stand for none.

    Raises:
        SideJobFailedError: a rank could not read a batch. Every rank computes all batches and then
            raises: a rank that left earlier would leave the others waiting in a collective.
    """
    seq_len, batch_size = config.model.max_seq_len, config.training.batch_size
    wanted = max(1, config.training.eval_tokens // seq_len)
    n_sequences = min(wanted, stream.n_sequences(seq_len))
    failure = ""
    # On the CPU, so that the loop does not wait for the device.
    n_bytes = 0
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    batch = torch.empty(2, batch_size, seq_len, dtype=torch.int64)
    model.eval()
    for first in range(0, n_sequences, batch_size * world.size):
        begin = first + world.rank * batch_size
        rows = range(begin, min(begin + batch_size, n_sequences))
        try:
            sequences = [stream.read(row, seq_len) for row in rows]
            fill_batch(sequences, batch)
            n_bytes += sum(text_bytes.count(tokens[1:], int(tokens[0])) for tokens in sequences)
        except (OSError, ValueError) as error:
            failure = f": {error}"
            batch[0], batch[1] = 0, IGNORED
        inputs, targets = batch.to(world.device)
        cu_seqlens = None
        if packing is not None:
            cu_seqlens = torch.from_numpy(packing.cu_seqlens(batch.numpy())).to(world.device)
        loss = model(inputs, targets, cu_seqlens=cu_seqlens)
        sums[0] += loss.double() * (len(rows) * seq_len)
    model.train()
    sums[1], sums[2] = n_bytes, bool(failure)
    loss_sum, total_bytes, failed = (world.size * mean for mean in world.mean(sums).tolist())
    if failed:
        raise SideJobFailedError(
            f"{round(failed)} of {world.size} ranks cannot read the held-out text{failure}"
        )
    bits = loss_sum / math.log(2)
    return loss_sum / (n_sequences * seq_len), bits / total_bytes if total_bytes else math.nan
