"""The models: `MuEModel` (encoder and decoder) and `MuEForConditionalGeneration` (with the tied output head)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import auto_docstring, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .cache_mue import MuECache
from .configuration_mue import MuEConfig
from .criteria_mue import ExitPolicy
from .decoder_mue import MuEDecoder
from .encoder_mue import MuEEncoder, MuEEncoderOutput
from .exit_options_mue import OPTION_NAMES, ExitOptions, check_names
from .generation_mue import MuEGenerationMixin
from .layers_mue import MuEAttention, MuEOutputHead
from .memo_mue import WeightMemo
from .vision_mue import trunk_features


@auto_docstring(custom_intro="Output of `MuEModel`.")
@dataclass
class MuEModelOutput(Seq2SeqModelOutput):
    r"""
    encoder_attention_mask (`torch.BoolTensor` of shape `(batch_size, source_length)`):
        Source positions that exist, image then text.
    image_exit_layers (`torch.LongTensor` of shape `(batch_size,)`):
        Layers run by each sample's image stream, 0 without an image. Only when exits were asked for.
    text_exit_layers (`torch.LongTensor` of shape `(batch_size,)`):
        The same for the text stream.
    decoder_exit_layers (`torch.LongTensor` of shape `(rows,)`):
        Layers run by each decoder row in this call.
    executed_layers (`dict[str, int]`):
        "image", "text", "decoder": how often a layer ran in this call, as rows x tokens.
    """

    encoder_attention_mask: torch.BoolTensor | None = None
    image_exit_layers: torch.LongTensor | None = None
    text_exit_layers: torch.LongTensor | None = None
    decoder_exit_layers: torch.LongTensor | None = None
    executed_layers: dict[str, int] | None = None


@auto_docstring(custom_intro="Output of `MuEForConditionalGeneration`.")
@dataclass
class MuESeq2SeqLMOutput(Seq2SeqLMOutput):
    r"""
    image_exit_layers (`torch.LongTensor` of shape `(batch_size,)`):
        Layers run by each sample's image stream, 0 without an image. Only when exits were asked for.
    text_exit_layers (`torch.LongTensor` of shape `(batch_size,)`):
        The same for the text stream.
    decoder_exit_layers (`torch.LongTensor` of shape `(rows,)`):
        Layers run by each decoder row in this call.
    executed_layers (`dict[str, int]`):
        "image", "text", "decoder": how often a layer ran in this call, as rows x tokens.
    """

    image_exit_layers: torch.LongTensor | None = None
    text_exit_layers: torch.LongTensor | None = None
    decoder_exit_layers: torch.LongTensor | None = None
    executed_layers: dict[str, int] | None = None


def shift_tokens_right(labels: Tensor, pad_token_id: int, start_token_id: int) -> Tensor:
    """Decoder input [batch, length] for labels: the start token, then all but the last label; -100 becomes padding."""
    shifted = torch.cat([torch.full_like(labels[:, :1], start_token_id), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


@auto_docstring
class MuEPreTrainedModel(PreTrainedModel):
    config: MuEConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MuEEncoderLayer", "MuEDecoderLayer"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    # the additive position bias has no place in these kernels
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Sets the attention of encoder and decoder; the trunk keeps its own unless a dict names `backbone_config`."""
        requested = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation}
        if "" in requested:
            self.config._attn_implementation_internal = self._check_and_adjust_attn_implementation(
                requested[""], is_init_check=False, allow_all_kernels=allow_all_kernels
            )
        if "backbone_config" in requested:
            self.base_model.encoder.embed_images.set_attn_implementation(
                requested["backbone_config"], allow_all_kernels
            )

    def _init_weights(self, module: nn.Module) -> None:
        # the trunk initialises itself, by its own rules
        if isinstance(module, PreTrainedModel) and not isinstance(module, MuEPreTrainedModel):
            return
        std = self.config.init_std
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # OFA's padding row is not zero either: it is tied to the output head
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MuEAttention):
            init.ones_(module.c_attn)


@auto_docstring(custom_intro="Encoder and decoder without an output head.")
class MuEModel(MuEPreTrainedModel):
    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: MuEConfig):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.encoder = MuEEncoder(config)
        self.decoder = MuEDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.shared = value
        self.encoder.embed_tokens = value
        self.decoder.embed_tokens = value

    def get_encoder(self, modality: str | None = None) -> MuEEncoder:
        return self.encoder

    def get_decoder(self) -> MuEDecoder:
        return self.decoder

    def trunk_features(self, pixel_values: Tensor) -> Tensor:
        """The trunk's features [batch, channels, rows, columns] of pixels [batch, 3, height, width], which `forward`
        and `generate` take as `image_features`: cache them while the trunk is frozen."""
        return trunk_features(self.encoder.embed_images, pixel_values)

    @deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        patch_mask: torch.BoolTensor | None = None,
        image_features: torch.FloatTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: MuEEncoderOutput | None = None,
        cache: MuECache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_exit_layers: bool | None = None,
        exit_step: int | None = None,
        exit_num_steps: int | None = None,
        exit_policy: ExitPolicy | None = None,
        active_rows: torch.BoolTensor | None = None,
        predict: Any = None,
        **kwargs: Any,
    ) -> MuEModelOutput:
        r"""
        patch_mask (`torch.BoolTensor` of shape `(images,)`, *optional*):
            False where a sample has no image; its pixels are ignored.
        image_features (`torch.FloatTensor` of shape `(images, channels, rows, columns)`, *optional*):
            The trunk's last feature map, in place of `pixel_values` (see `trunk_features`).
        decoder_input_ids (`torch.LongTensor` of shape `(rows, target_length)`):
            Several decoder rows per encoded sample are allowed: row r belongs to sample r // (rows // batch).
        output_exit_layers (`bool`, *optional*):
            Whether to return exit depths and the executed-layer record. Default: whether exit options were passed.
        exit_step (`int`, *optional*):
            The decoding step t of Theta(t), from 0. Default: the position of the last new token.
        exit_num_steps (`int`, *optional*):
            N of Theta(t), the greatest number of new tokens. Default: what the generation config allows.
        exit_policy (`ExitPolicy`, *optional*):
            The decoder's policy at this step, as `generate` passes it, in place of the decoder's exit options.
        active_rows (`torch.BoolTensor` of shape `(rows,)`, *optional*):
            Decoder rows that are worth running; the others have depth 0.
        predict (`Callable`, *optional*):
            Normalised decoder states (rows, d_model) -> logits, for criteria that look at the output. Default: the
            tied embedding matrix.
        kwargs (*optional*):
            The exit options of [`ExitOptions`] by name, e.g. `decoder_exit_threshold=0.95`.
        """
        options, active = self._exit_options(kwargs)
        if output_exit_layers is None:
            output_exit_layers = active
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"`output_attentions=True` needs eager attention, got {self.config._attn_implementation!r}; "
                'call `model.set_attn_implementation("eager")` first.'
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pixel_values=pixel_values,
                patch_mask=patch_mask,
                image_features=image_features,
                inputs_embeds=inputs_embeds,
                exit_options=options,
                output_exit_layers=output_exit_layers,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
            )
        elif getattr(encoder_outputs, "position_embeddings", None) is None:
            raise ValueError(
                "`encoder_outputs` must be what `model.get_encoder()(...)` returned: the decoder needs its mask and "
                f"position embeddings, got {type(encoder_outputs).__name__}."
            )
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            start = self.config.decoder_start_token_id
            rows = encoder_outputs.last_hidden_state.shape[0]
            decoder_input_ids = torch.full((rows, 1), start, device=encoder_outputs.last_hidden_state.device)
        cache = self._cache(cache, use_cache, options, decoder_input_ids, decoder_inputs_embeds)
        if exit_policy is None:
            tokens = decoder_input_ids if decoder_input_ids is not None else decoder_inputs_embeds
            last = (0 if cache is None else cache.length) + tokens.shape[1] - 1
            exit_policy = options.policy("decoder", self.config.decoder_layers).at_step(
                last if exit_step is None else exit_step, exit_num_steps or self.config.max_position_embeddings
            )
        decoder_outputs = self.decoder(
            encoder_outputs,
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            cache=cache,
            active_rows=active_rows,
            policy=exit_policy,
            predict=predict or (lambda states: nn.functional.linear(states, self.shared.weight)),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        output = MuEModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            cache=decoder_outputs.cache,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )
        if output_exit_layers:
            output.encoder_attention_mask = encoder_outputs.attention_mask
            output.image_exit_layers = encoder_outputs.image_exit_layers
            output.text_exit_layers = encoder_outputs.text_exit_layers
            output.decoder_exit_layers = decoder_outputs.exit_layers
            output.executed_layers = {
                **(encoder_outputs.executed_layers or {}),
                "decoder": decoder_outputs.executed_layers,
            }
        return output

    def _exit_options(self, kwargs: dict[str, Any]) -> tuple[ExitOptions, bool]:
        """The options among a call's keyword arguments, and whether there were any."""
        check_names(kwargs)
        given = {name: value for name, value in kwargs.items() if name in OPTION_NAMES and value is not None}
        return ExitOptions.from_dict(given, self.config), bool(given)

    def _cache(
        self,
        cache: MuECache | None,
        use_cache: bool | None,
        options: ExitOptions,
        ids: Tensor | None,
        embeds: Tensor | None,
    ) -> MuECache | None:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is not None:
            if not hasattr(cache, "kv_policy"):
                raise ValueError(
                    f"`cache` must be a MuECache, got {type(cache).__name__}; "
                    "other caches cannot hold tokens that skipped layers."
                )
            return cache
        if not use_cache or (self.training and torch.is_grad_enabled()):
            return None
        length = (ids if ids is not None else embeds).shape[1]
        return MuECache(self.config, max(length, 32), options.exit_kv)


@auto_docstring(custom_intro="MuE with its tied output head: captions, closed answers, and fine-tuning.")
class MuEForConditionalGeneration(MuEPreTrainedModel, MuEGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.shared.weight"}

    def __init__(self, config: MuEConfig):
        super().__init__(config)
        self.model = MuEModel(config)
        self.lm_head = MuEOutputHead(config.d_model, config.vocab_size, bias=False)
        self.fingerprints = WeightMemo(1)
        # A generation config marked as made from a model config would lose exit options and presets on loading.
        self.generation_config._from_model_config = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_encoder(self, modality: str | None = None) -> MuEEncoder:
        return self.model.get_encoder()

    def get_decoder(self) -> MuEDecoder:
        return self.model.get_decoder()

    def trunk_features(self, pixel_values: Tensor) -> Tensor:
        """See [`MuEModel.trunk_features`]."""
        return self.model.trunk_features(pixel_values)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Decoder input [batch, length] that predicts labels [batch, length]."""
        return shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    @deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        patch_mask: torch.BoolTensor | None = None,
        image_features: torch.FloatTensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: MuEEncoderOutput | None = None,
        cache: MuECache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_exit_layers: bool | None = None,
        exit_step: int | None = None,
        exit_num_steps: int | None = None,
        exit_policy: ExitPolicy | None = None,
        active_rows: torch.BoolTensor | None = None,
        logits_to_keep: int | Tensor = 0,
        emitted_ids: slice | torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> MuESeq2SeqLMOutput:
        r"""
        patch_mask (`torch.BoolTensor` of shape `(images,)`, *optional*):
            False where a sample has no image; its pixels are ignored.
        image_features (`torch.FloatTensor` of shape `(images, channels, rows, columns)`, *optional*):
            The trunk's last feature map, in place of `pixel_values` (see `trunk_features`).
        labels (`torch.LongTensor` of shape `(rows, target_length)`, *optional*):
            Target tokens; -100 is ignored. Without `decoder_input_ids` they also make the decoder's input.
        output_exit_layers (`bool`, *optional*):
            Whether to return exit depths and the executed-layer record. Default: whether exit options were passed.
        exit_step (`int`, *optional*):
            The decoding step t of Theta(t), from 0. Default: the position of the last new token.
        exit_num_steps (`int`, *optional*):
            N of Theta(t), the greatest number of new tokens. Default: what the generation config allows.
        exit_policy (`ExitPolicy`, *optional*):
            The decoder's policy at this step, as `generate` passes it, in place of the decoder's exit options.
        active_rows (`torch.BoolTensor` of shape `(rows,)`, *optional*):
            Decoder rows that are worth running; the others have depth 0.
        emitted_ids (`slice` or `torch.LongTensor`, *optional*):
            Token ids whose logits are wanted, as `generate` passes them; those of the others are -inf.
        kwargs (*optional*):
            The exit options of [`ExitOptions`] by name, e.g. `decoder_exit_threshold=0.95`.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        limits = self.generation_config
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            patch_mask=patch_mask,
            image_features=image_features,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            cache=cache,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_exit_layers=output_exit_layers,
            exit_step=exit_step,
            exit_num_steps=exit_num_steps or limits.max_new_tokens or limits.max_length,
            exit_policy=exit_policy,
            active_rows=active_rows,
            predict=self.lm_head,
            return_dict=True,
            **{name: value for name, value in kwargs.items() if "exit" in name},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._logits(outputs.last_hidden_state[:, keep], emitted_ids)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                shift_labels=labels,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        return MuESeq2SeqLMOutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
            image_exit_layers=outputs.image_exit_layers,
            text_exit_layers=outputs.text_exit_layers,
            decoder_exit_layers=outputs.decoder_exit_layers,
            executed_layers=outputs.executed_layers,
        )

    def _logits(self, states: Tensor, ids: slice | Tensor | None) -> Tensor:
        if ids is None:
            return self.lm_head(states)
        if getattr(self.lm_head, "takes_ids", False):
            return self.lm_head(states, ids)
        # a head that was resized or replaced
        logits = self.lm_head(states)
        kept = torch.full_like(logits, -torch.inf)
        kept[..., ids] = logits[..., ids]
        return kept


__all__ = [
    "MuEForConditionalGeneration",
    "MuEModel",
    "MuEModelOutput",
    "MuEPreTrainedModel",
    "MuESeq2SeqLMOutput",
    "shift_tokens_right",
]
