"""What `generate` needs to exit early: options into policies, Theta(t) from step to step, depths back through beams;
and the scoring of closed answer sets."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerateBeamEncoderDecoderOutput,
    GenerateEncoderDecoderOutput,
    GenerationMode,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import ModelOutput

from .answers_mue import answer_contexts, answer_scores, answer_tree
from .cache_mue import MuECache
from .early_exit_mue import ExitSchedule
from .exit_options_mue import CONFIG_NAMES, check_names, chosen_preset, resolve_options
from .memo_mue import WeightMemo, modules_of, weights_of

# Processors that do not look at the scores of tokens that a prefix constraint forbids.
MASKING = (
    *(ForcedBOSTokenLogitsProcessor, ForcedEOSTokenLogitsProcessor, ExitSchedule, LogitNormalization),
    *(MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor, NoRepeatNGramLogitsProcessor),
    *(PrefixConstrainedLogitsProcessor, SuppressTokensLogitsProcessor),
    *(TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper),
)

# Values of each tensor that the fingerprint of the weights looks at: training changes all of them.
FINGERPRINT_SAMPLES = 64


@dataclass
class MuEGenerateOutput(GenerateEncoderDecoderOutput):
    r"""Output of `generate` with greedy decoding or sampling.

    image_exit_layers (`torch.LongTensor` of shape `(batch_size,)`):
        Layers run by each sample's image stream; 0 without an image.
    text_exit_layers (`torch.LongTensor` of shape `(batch_size,)`):
        Layers run by each sample's text stream; 0 without text.
    decoder_exit_layers (`torch.LongTensor` of shape `(sequences, new_tokens)`):
        Layers run for each new token; 0 where a sequence has no token any more.
    executed_layers (`dict[str, int]`):
        "image", "text", "decoder": how often a layer ran in the whole call, as rows x tokens.
    """

    image_exit_layers: torch.LongTensor | None = None
    text_exit_layers: torch.LongTensor | None = None
    decoder_exit_layers: torch.LongTensor | None = None
    executed_layers: dict[str, int] | None = None


@dataclass
class MuEGenerateBeamOutput(GenerateBeamEncoderDecoderOutput):
    r"""Output of `generate` with beams; the fields beyond transformers' own are those of [`MuEGenerateOutput`]. All
    running beams count in `executed_layers`, also those that no returned sequence descends from."""

    image_exit_layers: torch.LongTensor | None = None
    text_exit_layers: torch.LongTensor | None = None
    decoder_exit_layers: torch.LongTensor | None = None
    executed_layers: dict[str, int] | None = None


@dataclass
class MuEScoreOutput(ModelOutput):
    r"""Output of `score_answers(..., return_dict=True)`.

    scores (`torch.FloatTensor` of shape `(batch_size, answers)`):
        Log-probabilities.
    image_exit_layers, text_exit_layers (`torch.LongTensor` of shape `(batch_size,)`):
        Layers run by each sample's streams.
    decoder_exit_layers (`torch.LongTensor` of shape `(batch_size, contexts)`):
        Layers run for each place where answers part; one place if all answers are single tokens.
    executed_layers (`dict[str, int]`):
        "image", "text", "decoder": how often a layer ran, as rows x tokens.
    """

    scores: torch.FloatTensor | None = None
    image_exit_layers: torch.LongTensor | None = None
    text_exit_layers: torch.LongTensor | None = None
    decoder_exit_layers: torch.LongTensor | None = None
    executed_layers: dict[str, int] | None = None


@dataclass
class _ExitRun:
    """The state of one `generate` call: its schedule and what its steps reported."""

    schedule: ExitSchedule
    eos_token_ids: Tensor | None
    text_ids: slice | None = None
    constraint: PrefixConstrainedLogitsProcessor | None = None
    skip_finished: bool = False
    depths: list[Tensor] = field(default_factory=list)
    executed: int = 0

    def finished(self, sequences: Tensor) -> Tensor:
        """[rows, new tokens]: whether a sequence had ended before each new token of sequences [rows, length]."""
        new = sequences[:, self.schedule.prompt_length :]
        if self.eos_token_ids is None:
            return torch.zeros_like(new, dtype=torch.bool)
        ended = torch.isin(new, self.eos_token_ids.to(new.device)).int().cumsum(dim=1)
        return torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], dim=1).bool()

    def active_rows(self, input_ids: Tensor) -> Tensor | None:
        """Rows [rows] that still want a token, or None for all."""
        if not self.skip_finished or self.eos_token_ids is None or input_ids.shape[1] <= self.schedule.prompt_length:
            return None
        new = input_ids[:, self.schedule.prompt_length :]
        return ~torch.isin(new, self.eos_token_ids.to(new.device)).any(dim=1)

    def follow_constraint(self, processors: LogitsProcessorList, config: GenerationConfig) -> None:
        """Lets a prefix constraint among the processors say which logits are computed, where no processor and no user
        looks at the others."""
        places = [i for i, x in enumerate(processors) if isinstance(x, PrefixConstrainedLogitsProcessor)]
        # beams compare sums of log-probabilities, which depend on what else is computed unless they are renormalised
        comparable = config.num_beams == 1 or config.renormalize_logits
        if not places or config.output_logits or not comparable:
            return
        if all(type(processor) in MASKING for processor in processors):
            given = processors[places[0]]
            # asked by the output head and then by the processor; the given one may be the user's, for other calls too
            allowed = _asked_once(given._prefix_allowed_tokens_fn)
            self.constraint = PrefixConstrainedLogitsProcessor(allowed, given._num_beams)
            processors[places[0]] = self.constraint

    def emitted_ids(self, input_ids: Tensor) -> slice | Tensor | None:
        """Token ids that may follow one of input_ids [rows, length]; None for all."""
        if self.constraint is None:
            return self.text_ids
        allowed, beams = self.constraint._prefix_allowed_tokens_fn, self.constraint._num_beams
        following = {int(token) for row, ids in enumerate(input_ids) for token in allowed(row // beams, ids)}
        return torch.tensor(sorted(following), device=input_ids.device) if following else None


class MuEGenerationMixin(GenerationMixin):
    """`generate` with exit options, per-token thresholds, and exit depths in its output."""

    # the fingerprint of the weights
    fingerprints: WeightMemo

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        call = {name: kwargs.pop(name) for name in list(kwargs) if name in CONFIG_NAMES}
        check_names(kwargs, CONFIG_NAMES)
        passed = {} if generation_config is None else _exit_attributes(generation_config)
        saved = _exit_attributes(self.generation_config)
        options = resolve_options(call, passed, saved, self.config)
        if options.active:
            self._check_calibration(chosen_preset(call, passed, saved))
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if options.active and generation_config.use_cache is False:
            raise ValueError(
                "exits in `generate` need the cache, but `use_cache=False` was passed; drop it, or turn exits off "
                'with `exit_criterion="never"`.'
            )
        mask = model_kwargs.get("decoder_attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "decoder prompts of different lengths must be padded on the left, so that new tokens follow them, but "
                "`decoder_attention_mask` ends in 0; pad on the left."
            )
        generation_config._exit_options = options
        return generation_config, model_kwargs

    def _check_calibration(self, preset: Mapping[str, Any]) -> None:
        """Warns, once per place in the caller's code, if the preset was calibrated on other weights."""
        expected = preset.get("weights_fingerprint")
        if expected is None:
            return
        make, weights = partial(weights_fingerprint, self), weights_of(modules_of(self))
        # the memo says None where changes would go unseen
        if (self.fingerprints.get("weights", weights, make) or make()) not in (None, expected):
            warnings.warn(
                "the exit preset of this call was calibrated on other weights, or in another dtype: what it promises "
                "does not hold for this model; run `mue-hf calibrate` again.",
                stacklevel=_callers_level(),
            )

    def _validate_generation_mode(
        self, generation_mode: GenerationMode, generation_config: GenerationConfig, generation_mode_kwargs: dict
    ) -> None:
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        if generation_mode == GenerationMode.ASSISTED_GENERATION and generation_config._exit_options.active:
            raise ValueError(
                "assisted generation verifies drafts at full depth and cannot exit early; drop the assistant, or turn "
                'exits off with `exit_criterion="never"`.'
            )

    def _prepare_model_inputs(
        self, inputs: Tensor | None, bos_token_id: Tensor | None, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, str | None, dict[str, Any]]:
        text = inputs is not None or any(model_kwargs.get(x) is not None for x in ("input_ids", "inputs_embeds"))
        if not text and model_kwargs.get("encoder_outputs") is None:
            # pictures alone: without this, the text stream would be given a lone start token
            for name in ("pixel_values", "image_features"):
                if model_kwargs.get(name) is not None:
                    model_kwargs.pop("input_ids", None)
                    return model_kwargs.pop(name), name, model_kwargs
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, Any]:
        if model_kwargs.get("encoder_outputs") is None:
            model_kwargs["exit_options"] = generation_config._exit_options
            model_kwargs["output_exit_layers"] = True
            model_kwargs = self._prepare_text_encoder_decoder_kwargs_for_generation(
                inputs_tensor, model_kwargs, model_input_name, generation_config
            )
        # the encoder is done with these; its output carries the mask of image and text
        for name in (
            *("pixel_values", "image_features", "patch_mask", "attention_mask", "inputs_embeds"),
            *("exit_options", "output_exit_layers"),
        ):
            model_kwargs.pop(name, None)
        return model_kwargs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        # Beams share their image: the encoder's output stays one row per sample.
        encoder_outputs = model_kwargs.pop("encoder_outputs", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, False, input_ids, **model_kwargs)
        return input_ids, model_kwargs | {"encoder_outputs": encoder_outputs}

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        options, implementation = generation_config._exit_options, generation_config.cache_implementation
        if implementation not in (None, "dynamic", "static"):
            raise ValueError(
                f"`cache_implementation` must be None, 'dynamic' or 'static', got {implementation!r}; "
                "other caches cannot hold tokens that skipped layers."
            )
        cache = model_kwargs.get("cache")
        if cache is not None:
            if options.active and getattr(cache, "kv_policy", options.exit_kv) != options.exit_kv:
                raise ValueError(
                    f"`exit_kv={options.exit_kv!r}` contradicts the cache that was passed, which has "
                    f"{cache.kv_policy!r}; make the cache with `kv_policy={options.exit_kv!r}`."
                )
            cache._is_user_defined = True
        elif generation_config.use_cache:
            longest = max(max_cache_length, generation_config.max_cache_len or 0)
            model_kwargs["cache"] = MuECache(self.config, longest, options.exit_kv)

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: int | None = None,
        *args: Any,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        processors = super()._get_logits_processor(
            generation_config, input_ids_seq_length, *args, model_kwargs=model_kwargs, **kwargs
        )
        policy = generation_config._exit_options.policy("decoder", self.config.decoder_layers)
        num_steps = generation_config.max_length - input_ids_seq_length
        schedule = ExitSchedule(policy, input_ids_seq_length, num_steps)
        processors.append(schedule)
        if model_kwargs is not None:
            run = _ExitRun(schedule, generation_config._eos_token_tensor)
            constrained = any(isinstance(x, PrefixConstrainedLogitsProcessor) for x in processors)
            if self.config.num_text_tokens < self.config.vocab_size and not constrained:
                run.text_ids = slice(0, self.config.num_text_tokens)
            model_kwargs["exit_run"] = run
        return processors

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, *args: Any, exit_run: _ExitRun | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Adds to transformers' inputs the policy of this step and the rows that still want a token."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if exit_run is not None:
            model_inputs["exit_policy"] = exit_run.schedule.policy
            model_inputs["active_rows"] = exit_run.active_rows(input_ids)
            model_inputs["emitted_ids"] = exit_run.emitted_ids(input_ids)
            model_inputs["output_exit_layers"] = True
        return model_inputs

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        run = model_kwargs.get("exit_run")
        if run is not None:
            run.depths.append(outputs.decoder_exit_layers)
            run.executed += outputs.executed_layers["decoder"]
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)

    def _sample(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        run, config = kwargs["exit_run"], kwargs["generation_config"]
        # Rows that have ended are not run, unless somebody looks at what they would compute.
        run.skip_finished = not any(
            getattr(config, f"output_{name}") for name in ("scores", "logits", "attentions", "hidden_states")
        )
        run.follow_constraint(kwargs["logits_processor"], config)
        output = super()._sample(input_ids, *args, **kwargs)
        if isinstance(output, Tensor):
            return output
        depths = torch.stack(run.depths, dim=1)[:, : output.sequences.shape[1] - input_ids.shape[1]]
        depths = depths.masked_fill(run.finished(output.sequences), 0)
        return MuEGenerateOutput(**output, **self._exit_fields(run, depths, kwargs["encoder_outputs"]))

    def _beam_search(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = kwargs["exit_run"]
        run.follow_constraint(kwargs["logits_processor"], kwargs["generation_config"])
        output = super()._beam_search(input_ids, *args, **kwargs)
        if isinstance(output, Tensor):
            return output
        # Token t of a sequence was made by row beam_indices[t] of step t; -1 is no token.
        steps, rows = torch.stack(run.depths), output.beam_indices.long()
        depths = steps[torch.arange(rows.shape[1], device=rows.device), rows.clamp_min(0)].masked_fill(rows < 0, 0)
        return MuEGenerateBeamOutput(**output, **self._exit_fields(run, depths, kwargs["encoder_outputs"]))

    @staticmethod
    def _exit_fields(run: _ExitRun, depths: Tensor, encoder_outputs: ModelOutput) -> dict[str, Any]:
        return {
            "image_exit_layers": encoder_outputs.image_exit_layers,
            "text_exit_layers": encoder_outputs.text_exit_layers,
            "decoder_exit_layers": depths,
            "executed_layers": {**(encoder_outputs.executed_layers or {}), "decoder": run.executed},
        }

    @torch.no_grad()
    def score_answers(
        self,
        answers: Sequence[Sequence[int]],
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        return_dict: bool = False,
        **inputs: Any,
    ) -> Tensor | MuEScoreOutput:
        """Log-probabilities of a closed set of answers, as OFA scores visual entailment.

        Each answer is teacher-forced after the decoder prompt; at each of its tokens, and at its end, the softmax runs
        over the tokens that some answer allows there. Only the output rows of those tokens are computed. Exit options
        apply as in `generate`: those saved with the model, those passed here first.

        Args:
            answers (list of lists of `int`): token ids, from `processor.encode_answers([...])`.
            decoder_input_ids (`LongTensor` [batch, length], *optional*): the decoder prompt, padded on the left.
                Default: the start token.
            decoder_attention_mask (`Tensor` [batch, length], *optional*): 0 on padding.
            return_dict (`bool`): whether to return a [`MuEScoreOutput`] with exit depths.
            inputs: what `forward` takes (`pixel_values`, `input_ids`, ...) and exit options by name.

        Returns:
            `Tensor` [batch, answers], or [`MuEScoreOutput`].

        Raises:
            ValueError: for empty or repeated answers, and whatever `forward` and the exit options refuse.
        """
        options = {name: inputs.pop(name) for name in list(inputs) if name in CONFIG_NAMES}
        check_names(inputs, CONFIG_NAMES)
        saved = _exit_attributes(self.generation_config)
        preset = chosen_preset(options, {}, saved)
        options = resolve_options(options, {}, saved, self.config)
        if options.active:
            self._check_calibration(preset)
        eos = self.generation_config.eos_token_id
        eos = eos[0] if isinstance(eos, list) else eos
        tree = answer_tree(answers, eos)
        _check_answer_ids(answers, self.config.vocab_size)
        encoder_outputs = inputs.pop("encoder_outputs", None)
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(**inputs, exit_options=options, output_exit_layers=True)
        batch, device = encoder_outputs.last_hidden_state.shape[0], encoder_outputs.last_hidden_state.device
        if decoder_input_ids is None:
            decoder_input_ids = torch.full((batch, 1), self.config.decoder_start_token_id, device=device)
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones_like(decoder_input_ids)
        if not bool(decoder_attention_mask[:, -1].all()):
            raise ValueError("`decoder_input_ids` must be padded on the left, but `decoder_attention_mask` ends in 0.")
        prefixes = [prefix for prefix, tokens in tree.items() if len(tokens) > 1]
        if not prefixes:
            # a single answer: nothing to decide, but depths and errors are those of running it
            prefixes = [()]
        contexts = answer_contexts(prefixes, decoder_input_ids, decoder_attention_mask, self.config.pad_token_id)
        num_steps = 1 + max(len(answer) for answer in answers)
        outputs = self.model(
            encoder_outputs=encoder_outputs,
            decoder_input_ids=contexts.input_ids,
            decoder_attention_mask=None if bool(contexts.attention_mask.all()) else contexts.attention_mask,
            exit_policy=options.policy("decoder", self.config.decoder_layers).at_step(0, num_steps),
            predict=self.lm_head,
            use_cache=False,
            output_exit_layers=True,
        )
        states = outputs.last_hidden_state[torch.arange(len(contexts.last), device=device), contexts.last]
        states = states.unflatten(0, (batch, len(prefixes)))
        log_probs = {
            prefix: nn.functional.linear(states[:, i], self.lm_head.weight[tree[prefix]]).log_softmax(-1)
            for i, prefix in enumerate(prefixes)
        }
        scores = torch.stack(answer_scores(answers, tree, log_probs, eos), dim=1)
        if not return_dict:
            return scores
        return MuEScoreOutput(
            scores=scores,
            image_exit_layers=encoder_outputs.image_exit_layers,
            text_exit_layers=encoder_outputs.text_exit_layers,
            decoder_exit_layers=outputs.decoder_exit_layers.unflatten(0, (batch, len(prefixes))),
            executed_layers={**(encoder_outputs.executed_layers or {}), **outputs.executed_layers},
        )


def _asked_once(allowed: Callable[[int, Tensor], list[int]]) -> Callable[[int, Tensor], list[int]]:
    """`allowed`, which is asked once for each prefix of the current length."""
    answers: dict[tuple[int, ...], list[int]] = {}

    def ask(batch_id: int, prefix: Tensor) -> list[int]:
        key = (batch_id, *prefix.tolist())
        if key not in answers:
            if answers and len(next(iter(answers))) != len(key):
                answers.clear()
            answers[key] = allowed(batch_id, prefix)
        return answers[key]

    return ask


def _exit_attributes(config: GenerationConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if "exit" in name and not name.startswith("_")}


def weights_fingerprint(model: nn.Module) -> str | None:
    """SHA-256 of the names, shapes and dtypes of a model's tensors and of up to 64 values of each, evenly spaced.

    It is cheap and tells models, dtypes and trained weights apart, but not every change of single values. None where
    weights are not in memory.
    """
    digest = sha256()
    for name, tensor in sorted(chain(model.named_parameters(), model.named_buffers())):
        if tensor.is_meta:
            return None
        values = tensor.detach().reshape(-1)
        values = values[:: max(1, values.numel() // FINGERPRINT_SAMPLES)].cpu()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(values.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _callers_level() -> int:
    """The `stacklevel`, for a warning of the calling function, of the first frame outside this package, torch and
    transformers."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        package = frame.f_globals.get("__package__") or ""
        if package != __package__ and package.partition(".")[0] not in ("torch", "transformers"):
            break
        frame, level = frame.f_back, level + 1
    return level


def _check_answer_ids(answers: Sequence[Sequence[int]], vocab_size: int) -> None:
    for answer in answers:
        if not all(0 <= token < vocab_size for token in answer):
            raise ValueError(
                f"`answers` must hold token ids in [0, {vocab_size}), got {list(answer)!r}; "
                "make them with `processor.encode_answers`."
            )


__all__ = [
    "MuEGenerateBeamOutput",
    "MuEGenerateOutput",
    "MuEGenerationMixin",
    "MuEScoreOutput",
    "weights_fingerprint",
]
