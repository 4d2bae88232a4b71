r"""The Reformer, a language model whose activations grow with the length alone.

They grow neither with the square of the length nor with the depth.

    x1 = x2 = tokens + positions
    y1 = x1 + Attention(norm x2)
    y2 = x2 + FeedForward(norm y1)

Attention is by LSH or local, both linear in the length. Layers are reversible, so that none keeps
activations. The feed-forward, the last norm and the loss are computed in chunks of tokens.

Where streams are not exact (see `reversible`) an LSH layer keeps bucket ids, 2 bytes a token, head
and round. Else its replay computes them again. Files of transformers: hf_format.py.
"""

import os
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyfast._support import checks
from pyfast.models.reformer import generation, hf_format
from pyfast.models.reformer.cache import ReformerCache
from pyfast.models.reformer.config import ReformerConfig
from pyfast.models.reformer.input_checks import check_inputs, check_length
from pyfast.models.reformer.layers import Attention, AxialPositions, FeedForward, LearnedPositions
from pyfast.models.reformer.loss import next_token_loss
from pyfast.nn import rotary
from pyfast.nn.chunked import ChunkedFeedForward
from pyfast.nn.reversible import ReversibleSequence


class Reformer(nn.Module):
    """A causal language model.

    `model(ids)` returns logits; with `labels=` it returns the loss.

    Args:
        config: ReformerConfig; the sizes and options.

    Example:
        >>> import torch, pyfast
        >>> config = pyfast.ReformerConfig(vocab_size=320, width=32, max_length=256)
        >>> model = pyfast.Reformer(config)
        >>> ids = torch.randint(320, (2, 100))
        >>> model(ids, labels=ids).backward()
        >>> model(ids).shape
        torch.Size([2, 100, 320])
        >>> model.generate(ids, max_new_tokens=5).shape
        torch.Size([2, 105])
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        checks.instance("config", config, ReformerConfig)
        self.config = config
        width = config.width
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.positions = None
        if config.positions == "axial":
            self.positions = AxialPositions(config.axial_shape, config.axial_widths)
        elif config.positions == "learned":
            self.positions = LearnedPositions(config.max_length, width)
        self.dropout = nn.Dropout(config.dropout)
        chunk = config.feed_forward_chunk or sys.maxsize
        blocks = []
        for layer_type in config.layers:
            feed_forward = ChunkedFeedForward(FeedForward(config), chunk)
            blocks.append((Attention(config, layer_type), feed_forward))
        self.layers = ReversibleSequence(
            blocks, exact=config.exact, fraction_bits=config.fraction_bits, store=config.store
        )
        self.norm = nn.LayerNorm(width if config.tied else 2 * width, eps=config.norm_eps)
        self.head = None
        if not config.tied:
            self.head = nn.Linear(2 * width, config.vocab_size, bias=config.head_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights from a normal distribution, and set biases to zero.

        Weights whose output is added to a stream are smaller the deeper the model is.
        """
        residual_std = self.config.init_std / (2 * len(self.config.layers)) ** 0.5
        for name, parameter in self.named_parameters():
            module = self.get_submodule(name.rpartition(".")[0])
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif name.endswith("bias"):
                parameter.zero_()
            elif name.endswith((".attention.out.weight", ".down.weight")):
                parameter.normal_(std=residual_std)
            else:
                parameter.normal_(std=self.config.init_std)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head; adapters and quantization leave it alone unless they are told to."""
        return self.tokens if self.head is None else self.head

    @classmethod
    def from_hf(cls, directory: str | os.PathLike, *, allow_pickle: bool = False) -> "Reformer":
        """Load a ReformerModelWithLMHead that transformers saved.

        In evaluation it has the same logits, for the same hash_seed.

        Args:
            directory: the folder of config.json and model.safetensors, or its shards.
            allow_pickle: bool, False by default; read pytorch_model.bin too. This is a pickle; it
                is read without running what is in it.

        Returns:
            The model, in evaluation mode.

        Raises:
            CheckpointError: a file is missing, damaged or of another model.
        """
        config, state_dict = hf_format.read(directory, allow_pickle)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(state_dict, assign=True)
        return model.requires_grad_().eval()

    def save_hf(self, directory: str | os.PathLike) -> None:
        """Write config.json and model.safetensors for transformers.

        If anything fails neither file is written, and what was there stays.

        Args:
            directory: the folder; it is made if it is not there.

        Raises:
            ValueError: transformers would compute something else. It has presets "hf", and "trax"
                if the rotations are random (no hash_seed) and n_buckets is set and factored alike
                by both. Layers must not be adapted or quantized.
            TypeError: the parameters have several dtypes.
        """
        hf_format.check_config(self.config)
        self._check_plain_layers()
        hf_format.write(self.config, self.state_dict(), directory)

    def _check_plain_layers(self) -> None:
        modules = dict(self.named_modules())
        with torch.device("meta"):
            new_model = Reformer(self.config)
        for name, new_module in new_model.named_modules():
            module_type = type(modules.get(name))
            if name and module_type is not type(new_module):
                raise ValueError(
                    f"{name} is {module_type.__name__}; it must be {type(new_module).__name__} for "
                    "transformers: merge(model, unwrap=True) makes plain layers of adapted ones, "
                    "and dense ones if they are in 4 bits"
                )

    def forward(
        self,
        ids: Tensor,
        *,
        labels: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        cache: ReformerCache | None = None,
    ) -> Tensor:
        """Compute the logits, or with labels the mean loss of predicting each from those before it.

        Args:
            ids: [batch, length], int64.
            labels: [batch, length], int64, mostly `ids` themselves; -100 for a token that is not to
                be predicted. The logits are then never in memory as a whole.
            key_padding_mask: [batch, length], bool; True for a token to be seen. All by default.
            n_hashes: int; rounds of hashing, the config's by default.
            cache: ReformerCache; ids continue from the tokens in it, and are appended. For
                inference, with eval().

        Returns:
            Logits, [batch, length, vocab_size], or the loss, a scalar.
        """
        check_inputs(self, ids, labels, key_padding_mask, n_hashes, cache)
        y1, y2 = self.streams(
            ids, key_padding_mask=key_padding_mask, n_hashes=n_hashes, cache=cache
        )
        if labels is None:
            return self.compute_logits(self.join_streams(y1, y2))
        return next_token_loss(self, y1, y2, labels)

    def streams(
        self, ids: Tensor, *, key_padding_mask=None, n_hashes=None, cache=None
    ) -> tuple[Tensor, Tensor]:
        """Return the two streams after all layers, [batch, length, width] each."""
        if cache is not None:
            options = [{"cache": layer} for layer in cache.layers]
            with torch.no_grad(), cache.appending(ids.shape[1]):
                return self._run_layers(ids, cache.length, key_padding_mask, n_hashes, options)
        length = ids.shape[1]
        ids, mask = self._pad(ids, key_padding_mask)
        options = [{} for _ in self.config.layers]
        y1, y2 = self._run_layers(ids, 0, mask, n_hashes, options)
        return (y1, y2) if y1.shape[1] == length else (y1[:, :length], y2[:, :length])

    def _run_layers(
        self,
        ids: Tensor,
        first: int,
        mask: Tensor | None,
        n_hashes: int | None,
        options: list[dict],
    ) -> tuple[Tensor, Tensor]:
        """Run tokens from position `first` on, with options for the attention of each layer."""
        x, length = self.tokens(ids), ids.shape[1]
        if self.positions is not None:
            # Padding can be beyond max_length; it has no position.
            positions = self.positions(first, min(length, self.config.max_length - first))
            x = x + F.pad(positions, (0, 0, 0, length - len(positions))).to(x.dtype)
        x = self.dropout(x)
        shared = {"key_padding_mask": mask}
        if self.config.positions == "rotary":
            shared["rotary"] = rotary.tables(first, length, self.config.head_dim, ids.device)
        for layer_type, layer_options in zip(self.config.layers, options):
            layer_options |= shared
            if layer_type == "lsh":
                layer_options["n_hashes"] = n_hashes
        return self.layers(x, x, f_kwargs=options)

    def _pad(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pad the length to a multiple of pad_to if it is above the smallest chunk."""
        config, length = self.config, ids.shape[1]
        if config.pad_to is None or length % config.pad_to == 0:
            return ids, mask
        if length <= min(map(config.chunk, config.layers)):
            return ids, mask
        missing = -length % config.pad_to
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        return F.pad(ids, (0, missing), value=config.pad_id), F.pad(mask, (0, missing))

    def join_streams(self, y1: Tensor, y2: Tensor) -> Tensor:
        """Return the input of the head: of the streams' mean if it is tied, else of both."""
        if self.config.tied:
            return self.dropout(self.norm((y1 + y2) / 2))
        return self.dropout(self.norm(torch.cat([y1, y2], dim=-1)))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Apply the head."""
        return F.linear(hidden, self.tokens.weight) if self.head is None else self.head(hidden)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        key_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue texts until all examples have had one of the config's end_ids.

        Tokens are hashed into as many buckets as fit the final length.

        Args:
            ids: [batch, length], int64; at least one token.
            max_new_tokens: int; the most tokens to append.
            temperature: float, 0 by default. 0 takes the most likely token; else tokens are drawn
                from the softmax of logits / temperature.
            top_k: int; draw from this number of most likely tokens. From all by default.
            top_p: float; draw from the most likely tokens that together have this probability.
                From all by default.
            key_padding_mask: [batch, length], bool; True for a token to be seen. For prompts that
                are padded at the front.
            n_hashes: int; rounds of hashing, the config's by default.
            generator: torch.Generator to draw from; torch's own by default.

        Returns:
            [batch, length + new], int64; `ids` and the tokens that follow.
        """
        check_inputs(self, ids, None, key_padding_mask, n_hashes, None)
        generation.check_sampling(ids, key_padding_mask, max_new_tokens, temperature, top_k, top_p)
        length = ids.shape[1] + max_new_tokens
        check_length(self, length)
        cache = ReformerCache(self, length)

        def sample_next(new: Tensor) -> Tensor:
            options = {"cache": cache}
            if cache.length == 0:
                options |= {"key_padding_mask": key_padding_mask, "n_hashes": n_hashes}
            y1, y2 = self.streams(new, **options)
            logits = self.compute_logits(self.join_streams(y1[:, -1], y2[:, -1]))
            return generation.sample(logits.float(), temperature, top_k, top_p, generator)

        with generation.evaluation_mode(self):
            return generation.append_tokens(ids, max_new_tokens, self.config.end_ids, sample_next)

    def extra_repr(self) -> str:
        return repr(self.config)
