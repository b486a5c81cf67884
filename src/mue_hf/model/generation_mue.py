"""What `generate` needs to exit early: options into policies, Theta(t) step by step, depths back through beams."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import (
    AssistedCandidateGenerator,
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

from .agreement_mue import check_answers
from .cache_mue import MuECache
from .early_exit_mue import ExitRecord, ExitSchedule
from .encoder_mue import check_attentions
from .exit_options_mue import CONFIG_NAMES, check_names, exit_attributes, resolve_options
from .presets_mue import weights_fingerprint
from .rescoring_mue import RescoringMixin, check_rescoring
from .scoring_mue import AnswerScoringMixin, MuEScoreOutput

Allowed = Callable[[int, Tensor], list[int]]
# Processors that do not look at the scores of tokens that a prefix constraint forbids.
MASKING = (
    *(ForcedBOSTokenLogitsProcessor, ForcedEOSTokenLogitsProcessor, LogitNormalization),
    *(MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor, NoRepeatNGramLogitsProcessor),
    *(PrefixConstrainedLogitsProcessor, SuppressTokensLogitsProcessor),
    *(TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper),
)


@dataclass
class MuEGenerateOutput(ExitRecord, GenerateEncoderDecoderOutput):
    """Output of `generate` with greedy decoding or sampling; see [`ExitRecord`] for exits."""


@dataclass
class MuEGenerateBeamOutput(ExitRecord, GenerateBeamEncoderDecoderOutput):
    """Output of `generate` with beams; see [`ExitRecord`] for exits. All running beams count in `executed_layers`,
    also those that no returned sequence descends from, and so does the pass of `exit_rescore`, whose scores are then
    `sequences_scores`."""


@dataclass
class _ExitRun:
    """The state of one `generate` call: its schedule and what its steps reported."""

    schedule: ExitSchedule
    eos_token_ids: Tensor | None
    # what criteria look at: states [rows, d] -> logits
    predict: Callable[[Tensor], Tensor]
    text_ids: slice | None = None
    # what may follow a prefix, where that says which logits are computed
    allowed: Allowed | None = None
    num_beams: int = 1
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
        if len(input_ids) == 1:
            # the loop ends with it
            return None
        new = input_ids[:, self.schedule.prompt_length :]
        return ~torch.isin(new, self.eos_token_ids.to(new.device)).any(dim=1)

    def emitted_ids(self, input_ids: Tensor) -> slice | Tensor | None:
        """Token ids that may follow one of input_ids [rows, length]; None for all."""
        if self.allowed is None:
            return self.text_ids
        following = {
            int(token) for row, ids in enumerate(input_ids) for token in self.allowed(row // self.num_beams, ids)
        }
        return torch.tensor(sorted(following), device=input_ids.device) if following else None


class _Processors(LogitsProcessorList):
    """As that of transformers, which reads the signature of every processor in every step."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if kwargs or any(_takes_more(type(processor)) for processor in self):
            return super().__call__(input_ids, scores, **kwargs)
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


@lru_cache(maxsize=64)
def _takes_more(kind: type) -> bool:
    """Whether processors of a class take more than ids and scores."""
    return len(signature(kind.__call__).parameters) > 3


class MuEGenerationMixin(AnswerScoringMixin, RescoringMixin, GenerationMixin):
    """`generate` with exit options, per-token thresholds, and exit depths in its output."""

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        # an assistant is given what the model that it drafts for holds
        kwargs.pop("exit_run", None)
        call = {name: kwargs.pop(name) for name in list(kwargs) if name in CONFIG_NAMES}
        check_names(kwargs, CONFIG_NAMES)
        passed = {} if generation_config is None else exit_attributes(generation_config)
        saved = exit_attributes(self.generation_config)
        options = resolve_options(call, passed, saved, self.config)
        check_answers(options.exit_fit, None)
        generation_config, model_kwargs = self._with_defaults(generation_config, kwargs)
        if options.active:
            self._check_chosen_preset(generation_config, call, passed, saved)
        if options.active_in_decoder and generation_config.use_cache is False:
            raise ValueError(
                "exits of the decoder in `generate` need the cache, but `use_cache=False` was passed; drop it, or "
                'turn exits off with `exit_criterion="never"`.'
            )
        check_attentions(self.config, generation_config.output_attentions)
        mask = model_kwargs.get("decoder_attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "decoder prompts of different lengths must be padded on the left, so that new tokens follow them, but "
                "`decoder_attention_mask` ends in 0; pad on the left."
            )
        generation_config._exit_options = options
        return generation_config, model_kwargs

    def _with_defaults(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig, dict]:
        """What transformers makes of a call's options and those saved with the model. It copies the latter in depth,
        which with presets and candidate tokens takes as long as a step of a small model: they are handed on as they
        are."""
        plain = copy(self.generation_config)
        saved = {name: vars(plain).pop(name) for name in exit_attributes(plain) if name in CONFIG_NAMES}
        # the model but for these
        owner = copy(self)
        owner.generation_config = plain
        config, model_kwargs = super(MuEGenerationMixin, owner)._prepare_generation_config(generation_config, **kwargs)
        for name, value in saved.items():
            if getattr(config, name, None) is None:
                setattr(config, name, value)
        return config, model_kwargs

    def _validate_generation_mode(
        self, generation_mode: GenerationMode, generation_config: GenerationConfig, generation_mode_kwargs: dict
    ) -> None:
        if generation_config._exit_options.exit_rescore:
            check_rescoring(generation_mode, generation_config, generation_mode_kwargs.get("streamer"))
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        if generation_mode != GenerationMode.ASSISTED_GENERATION:
            return
        if generation_config._exit_options.active_in_decoder:
            raise ValueError(
                "assisted generation verifies drafts at full depth, where the decoder cannot exit early; drop the "
                'assistant, or turn exits off with `exit_criterion="never"`.'
            )
        # the assistant has an encoder of its own, and asks for its inputs later
        generation_config._keep_encoder_inputs = True

    def _get_candidate_generator(
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> AssistedCandidateGenerator:
        depth = generation_config.assistant_early_exit
        if depth is None:
            return super()._get_candidate_generator(generation_config, *args, **kwargs)
        # Self-speculation. transformers would change the number of layers in the config, which nothing here reads.
        generator = AssistedCandidateGenerator(
            input_ids=kwargs["input_ids"],
            assistant_model=self,
            generation_config=generation_config,
            logits_processor=kwargs["logits_processor"],
            model_kwargs=kwargs["model_kwargs"],
            inputs_tensor=kwargs["inputs_tensor"],
        )
        generator.generation_config.assistant_early_exit = None
        generator.generation_config.exit_criterion = "fixed"
        generator.generation_config.decoder_exit_layer = depth
        return generator

    def _prepare_model_inputs(
        self, inputs: Tensor | None, bos_token_id: Tensor | None, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, str | None, dict[str, Any]]:
        if inputs is not None and inputs.dim() == 4:
            # pictures alone, of the model that this one drafts for
            return inputs, "pixel_values" if inputs.shape[1] == 3 else "image_features", model_kwargs
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
            options = getattr(generation_config, "_exit_options", None)
            # as the assistant of another call, the config has not been prepared
            options = options or resolve_options({}, {}, exit_attributes(generation_config), self.config)
            model_kwargs |= {"exit_options": options, "output_exit_layers": True}
            model_kwargs = self._prepare_text_encoder_decoder_kwargs_for_generation(
                inputs_tensor, model_kwargs, model_input_name, generation_config
            )
        done = ["exit_options", "output_exit_layers"]
        if not getattr(generation_config, "_keep_encoder_inputs", False):
            # the encoder is done with these; its output carries the mask of image and text
            done += ["pixel_values", "image_features", "patch_mask", "attention_mask", "inputs_embeds"]
        for name in done:
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
        prefix_allowed_tokens_fn: Allowed | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        config, allowed = generation_config, prefix_allowed_tokens_fn and _asked_once(prefix_allowed_tokens_fn)
        kwargs |= {"prefix_allowed_tokens_fn": allowed, "model_kwargs": model_kwargs}
        processors = super()._get_logits_processor(config, input_ids_seq_length, *args, **kwargs)
        schedule = ExitSchedule(
            config._exit_options.policy("decoder", self.config.decoder_layers),
            input_ids_seq_length,
            config.max_length - input_ids_seq_length,
        )
        if model_kwargs is not None:
            predict = self._exit_head(config._exit_options.exit_candidates)
            run = _ExitRun(schedule, config._eos_token_tensor, predict, num_beams=config.num_beams)
            model_kwargs["exit_run"] = run
            constrained = any(isinstance(x, PrefixConstrainedLogitsProcessor) for x in processors)
            if self.config.num_text_tokens < self.config.vocab_size and not constrained:
                run.text_ids = slice(0, self.config.num_text_tokens)
            # beams compare sums of log-probabilities, which depend on what else is computed unless renormalised
            comparable = config.num_beams == 1 or config.renormalize_logits
            # nobody looks at the logits of other tokens, and there is one next token
            if comparable and not config.output_logits and not getattr(config, "_keep_encoder_inputs", False):
                run.allowed = allowed if all(type(processor) in MASKING for processor in processors) else None
        return _Processors(processors)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, *args: Any, exit_run: _ExitRun | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Adds to transformers' inputs the policy of this step and the rows that still want a token."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if exit_run is not None:
            model_inputs["exit_policy"] = exit_run.schedule.policy(input_ids.shape[1])
            model_inputs["predict"] = exit_run.predict
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
        run.skip_finished = not (
            config.output_scores or config.output_logits or config.output_attentions or config.output_hidden_states
        )
        output = super()._sample(input_ids, *args, **kwargs)
        if isinstance(output, Tensor):
            return output
        depths = torch.stack(run.depths, dim=1)[:, : output.sequences.shape[1] - input_ids.shape[1]]
        depths = depths.masked_fill(run.finished(output.sequences), 0)
        return MuEGenerateOutput(**output, **_exit_record(run, depths, kwargs["encoder_outputs"]))

    def _beam_search(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        run, config = kwargs["exit_run"], kwargs["generation_config"]
        if config._exit_options.exit_rescore:
            kwargs["generation_config"] = all_beams = copy(config)
            all_beams.num_return_sequences, all_beams.return_dict_in_generate = config.num_beams, True
            every = super()._beam_search(input_ids, *args, **kwargs)
            output, executed = self._rescored(every, config, run, kwargs)
            run.executed += executed
            if not config.return_dict_in_generate:
                return output.sequences
        else:
            output = super()._beam_search(input_ids, *args, **kwargs)
        if isinstance(output, Tensor):
            return output
        # Token t of a sequence was made by row beam_indices[t] of step t; -1 is no token.
        steps, rows = torch.stack(run.depths), output.beam_indices.long()
        depths = steps[torch.arange(rows.shape[1], device=rows.device), rows.clamp_min(0)].masked_fill(rows < 0, 0)
        return MuEGenerateBeamOutput(**output, **_exit_record(run, depths, kwargs["encoder_outputs"]))


def _asked_once(allowed: Allowed) -> Allowed:
    """`allowed`, asked once for each prefix of the current length: the head and the processor both want to know."""
    answers: dict[tuple[int, ...], list[int]] = {}

    def ask(batch_id: int, prefix: Tensor) -> list[int]:
        key = (batch_id, *prefix.tolist())
        if key not in answers:
            if answers and len(next(iter(answers))) != len(key):
                answers.clear()
            answers[key] = allowed(batch_id, prefix)
        return answers[key]

    return ask


def _exit_record(run: _ExitRun, depths: Tensor, encoder_outputs: ModelOutput) -> dict[str, Any]:
    record = encoder_outputs.exit_record()
    executed = {**(encoder_outputs.executed_layers or {}), "decoder": run.executed}
    return record | {"decoder_exit_layers": depths, "executed_layers": executed}


__all__ = [
    "MuEGenerateBeamOutput",
    "MuEGenerateOutput",
    "MuEGenerationMixin",
    "MuEScoreOutput",
    "weights_fingerprint",
]
