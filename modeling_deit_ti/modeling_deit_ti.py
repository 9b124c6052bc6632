"""DeiT-Ti: a vision transformer with a class token, a distillation token, or both.

In the order of the forward pass: patches, tokens and positions, blocks, heads. Shapes: B images, C channels, N tokens
(first the learned ones, then the patches), width D, H attention heads.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_deit_ti import CLASS_TOKEN, DISTILLATION_TOKEN, DeiTTiConfig


@dataclass
class DeiTTiImageClassifierOutput(ModelOutput):
    """
    Output of [`DeiTTiForImageClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Loss between `logits` and the labels.
        logits (`torch.FloatTensor` of shape `(B, num_labels)`):
            The prediction: the logits of the head in `config.readout`, or the mean of both.
        class_logits (`torch.FloatTensor` of shape `(B, num_labels)`, *optional*, returned if there is a class token):
            Logits of the class head.
        distillation_logits (`torch.FloatTensor` of shape `(B, num_labels)`, *optional*, returned if there is a
            distillation token):
            Logits of the distillation head.
        hidden_states (`tuple` of `num_hidden_layers + 1` tensors of shape `(B, N, D)`, *optional*, returned when
            `output_hidden_states=True`):
            The embeddings and the output of each block, before the final layer norm.
        attentions (`tuple` of `num_hidden_layers` tensors of shape `(B, H, N, N)`, *optional*, returned when
            `output_attentions=True`):
            Attention probabilities.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    class_logits: torch.FloatTensor | None = None
    distillation_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def interpolate_position_embeddings(
    position_embeddings: torch.Tensor, num_tokens: int, size: tuple[int, int]
) -> torch.Tensor:
    """
    Resizes position embeddings to another grid of patches by bicubic interpolation, as in transformers' ViT and DeiT.
    Those of the learned tokens are left unchanged.

    Args:
        position_embeddings (`torch.Tensor` of shape `(1, num_tokens + rows * rows, D)`)
        num_tokens (`int`): number of learned tokens, which come first.
        size (`tuple[int, int]`): rows and columns of the new grid.

    Returns:
        `torch.Tensor` of shape `(1, num_tokens + size[0] * size[1], D)`
    """
    tokens, patches = position_embeddings[:, :num_tokens], position_embeddings[:, num_tokens:]
    side = int(patches.shape[1] ** 0.5)
    if (side, side) == tuple(size):
        return position_embeddings
    grid = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    return torch.cat((tokens, grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def drop_path(hidden_states: torch.Tensor, noise: torch.Tensor | None, rate: float) -> torch.Tensor:
    """Stochastic depth (Huang et al., 2016): drops the branch (B, N, D) of each image whose uniform number in `noise`
    (B,) is below `rate`, and scales up the others to keep the expected value. Without noise, drops nothing."""
    if rate == 0.0 or noise is None:
        return hidden_states
    keep = (noise >= rate).to(hidden_states.dtype).div(1 - rate)
    return hidden_states * keep[:, None, None]


def keep_patches(patches: torch.Tensor, noise: torch.Tensor, rate: float) -> torch.Tensor:
    """PatchDropout (Liu et al., 2023): keeps the `(B, N, D)` patches with the smallest uniform numbers in `noise`
    `(B, N)`, the same number for each image, at least one. Their positions have already been added."""
    kept = max(1, int(patches.shape[1] * (1 - rate)))
    places = noise.argsort(dim=1)[:, :kept, None].expand(-1, -1, patches.shape[2])
    return patches.gather(1, places)


class DeiTTiEmbeddings(nn.Module):
    """(B, C, height, width) pixels to (B, N, D): the learned tokens, then the patches, plus their positions."""

    def __init__(self, config: DeiTTiConfig):
        super().__init__()
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.patch_projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.class_token = self.distillation_token = None
        if CLASS_TOKEN in config.tokens:
            self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        if DISTILLATION_TOKEN in config.tokens:
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.num_tokens = len(config.tokens)
        num_patches = (config.image_size // config.patch_size) ** 2
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.num_tokens + num_patches, config.hidden_size))
        self.patch_drop_rate = config.patch_drop_rate
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        patch_drop_noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch_size, _, height, width = pixel_values.shape
        pixel_values = pixel_values.to(self.patch_projection.weight.dtype)
        positions = self.position_embeddings
        if (height, width) != (self.image_size, self.image_size):
            if not interpolate_pos_encoding:
                raise ValueError(
                    f"The images are {height}x{width} pixels, but the model expects {self.image_size}x"
                    f"{self.image_size}: resize them, or pass interpolate_pos_encoding=True."
                )
            grid = (height // self.patch_size, width // self.patch_size)
            positions = interpolate_position_embeddings(positions, self.num_tokens, grid)
        token_positions, patch_positions = positions.tensor_split((self.num_tokens,), dim=1)
        patches = self.patch_projection(pixel_values).flatten(2).transpose(1, 2) + patch_positions  # (B, patches, D)
        if self.training and self.patch_drop_rate > 0:
            if patch_drop_noise is None:
                patch_drop_noise = torch.rand(patches.shape[:2], device=patches.device)
            patches = keep_patches(patches, patch_drop_noise, self.patch_drop_rate)
        tokens = [token for token in (self.class_token, self.distillation_token) if token is not None]
        tokens = (torch.cat(tokens, dim=1) + token_positions).expand(batch_size, -1, -1)
        return self.dropout(torch.cat((tokens, patches), dim=1))


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Unfused attention. Unlike the fused kernels, it returns the attention probabilities."""
    attention = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, H, N, N)
    if attention_mask is not None:
        attention = attention + attention_mask
    attention = F.softmax(attention, dim=-1, dtype=torch.float32).to(query.dtype)
    attention = F.dropout(attention, p=dropout, training=module.training)
    return torch.matmul(attention, value).transpose(1, 2), attention


class DeiTTiAttention(nn.Module):
    def __init__(self, config: DeiTTiConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        # One matrix product for queries, keys and values: at this width, three small ones are slower.
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, num_queries: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, D) to (B, N, D), or (B, num_queries, D) for only the first tokens, which attend to all."""
        batch_size, length, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch_size, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, D / H)
        query = query[:, :, :num_queries]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        output, attention = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout)
        return self.projection(output.reshape(batch_size, -1, width)), attention


class DeiTTiMLP(nn.Module):
    def __init__(self, config: DeiTTiConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class DeiTTiLayer(GradientCheckpointingLayer):
    """A pre-norm block: x + attention(norm(x)), then x + MLP(norm(x)), with stochastic depth on each branch."""

    def __init__(self, config: DeiTTiConfig, drop_path_rate: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = DeiTTiAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = DeiTTiMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path_rate = drop_path_rate

    def forward(
        self, hidden_states: torch.Tensor, drop_path_noise: torch.Tensor | None = None, num_outputs: int | None = None
    ) -> torch.Tensor:
        """(B, N, D) to (B, N, D), or (B, num_outputs, D) for only the first tokens."""
        noise_of_attention, noise_of_mlp = (None, None) if drop_path_noise is None else drop_path_noise.unbind(dim=1)
        branch, _ = self.attention(self.attention_norm(hidden_states), num_outputs)
        hidden_states = hidden_states[:, :num_outputs]
        hidden_states = hidden_states + drop_path(self.dropout(branch), noise_of_attention, self.drop_path_rate)
        branch = self.mlp(self.mlp_norm(hidden_states))
        return hidden_states + drop_path(self.dropout(branch), noise_of_mlp, self.drop_path_rate)


class DeiTTiPreTrainedModel(PreTrainedModel):
    config_class = DeiTTiConfig
    base_model_prefix = "deit_ti"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # The loss is a mean over the batch, so Trainer has to divide it by the number of accumulation steps.
    accepts_loss_kwargs = False
    _input_embed_layer = "patch_projection"
    _no_split_modules = ["DeiTTiEmbeddings", "DeiTTiLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": DeiTTiLayer, "attentions": DeiTTiAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DeiTTiEmbeddings):
            for parameter in (module.class_token, module.distillation_token, module.position_embeddings):
                if parameter is not None:
                    init.trunc_normal_(parameter, std=std)


class DeiTTiModel(DeiTTiPreTrainedModel):
    """The network without its heads."""

    def __init__(self, config: DeiTTiConfig):
        super().__init__(config)
        self.embeddings = DeiTTiEmbeddings(config)
        rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(DeiTTiLayer(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        drop_path_noise: torch.Tensor | None = None,
        patch_drop_noise: torch.Tensor | None = None,
        learned_tokens_only: bool = False,
        **kwargs,
    ) -> BaseModelOutput | tuple:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, image_size, image_size)`):
                Normalised images, as the image processor returns them.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
                Whether to accept images of other sizes, by interpolating the position embeddings.
            drop_path_noise (`torch.Tensor` of shape `(B, num_hidden_layers, 2)`, *optional*):
                Uniform numbers in [0, 1), one per image and branch: in training, branches whose number is below the
                layer's rate are dropped. Drawn if not given.
            patch_drop_noise (`torch.Tensor` of shape `(B, patches)`, *optional*):
                Uniform numbers in [0, 1), one per patch: in training, if the model drops patches, those with the
                smallest numbers are kept. Drawn if not given.
            learned_tokens_only (`bool`, *optional*, defaults to `False`):
                Whether the last layer only computes the learned tokens, which saves three quarters of its work.
            output_hidden_states, output_attentions, return_dict (`bool`, *optional*):
                As in every transformers model. Attention probabilities need `attn_implementation="eager"`.

        Returns:
            `BaseModelOutput` with `last_hidden_state` of shape `(B, N, D)`: class token and distillation token (if the
            model has them), then the patches, unless `learned_tokens_only`; in training with `patch_drop_rate`, only
            the patches that were kept, in arbitrary order.

        Raises:
            ValueError: if the images have a different size and `interpolate_pos_encoding` is not set.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding, patch_drop_noise)
        noises = [None] * len(self.layers)
        if self.training and self.config.drop_path_rate > 0:
            if drop_path_noise is None:
                drop_path_noise = torch.rand(len(pixel_values), len(self.layers), 2, device=pixel_values.device)
            noises = drop_path_noise.unbind(dim=1)
        num_outputs = [None] * len(self.layers)
        if learned_tokens_only:
            num_outputs[-1] = len(self.config.tokens)
        for layer, noise, count in zip(self.layers, noises, num_outputs, strict=True):
            hidden_states = layer(hidden_states, noise, count)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class DeiTTiForImageClassification(DeiTTiPreTrainedModel):
    """DeiT-Ti with one linear head per learned token."""

    def __init__(self, config: DeiTTiConfig):
        super().__init__(config)
        self.deit_ti = DeiTTiModel(config)
        self.class_head = self.distillation_head = None
        if CLASS_TOKEN in config.tokens:
            self.class_head = nn.Linear(config.hidden_size, config.num_labels)
        if DISTILLATION_TOKEN in config.tokens:
            self.distillation_head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        drop_path_noise: torch.Tensor | None = None,
        patch_drop_noise: torch.Tensor | None = None,
        **kwargs,
    ) -> DeiTTiImageClassifierOutput | tuple:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, image_size, image_size)`):
                Normalised images, as the image processor returns them.
            labels (`torch.Tensor` of shape `(B,)` or `(B, num_labels)`, *optional*):
                If given, the output has the `loss` of `logits`, as in transformers' ViT and DeiT: cross-entropy for
                label ids, binary cross-entropy for float labels, mean squared error for a single label, unless
                `config.problem_type` says otherwise. The distillation losses are in distillation.py.

        Other arguments and exceptions: see [`DeiTTiModel`].

        Returns:
            [`DeiTTiImageClassifierOutput`]
        """
        # The heads only read the learned tokens, but a caller who asks for all layers' outputs gets all tokens.
        captures = ("output_hidden_states", "output_attentions")
        is_captured = any(kwargs.get(name, getattr(self.config, name)) for name in captures)
        output = self.deit_ti(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            drop_path_noise=drop_path_noise,
            patch_drop_noise=patch_drop_noise,
            learned_tokens_only=not is_captured,
            **kwargs,
        )
        tokens = output.last_hidden_state
        class_logits = distillation_logits = None
        if self.class_head is not None:
            class_logits = self.class_head(tokens[:, 0])
        if self.distillation_head is not None:
            # Position 1 after a class token, otherwise 0.
            distillation_logits = self.distillation_head(tokens[:, len(self.config.tokens) - 1])
        if self.config.readout == CLASS_TOKEN:
            logits = class_logits
        elif self.config.readout == DISTILLATION_TOKEN:
            logits = distillation_logits
        else:
            logits = (class_logits + distillation_logits) / 2
        return DeiTTiImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config, **kwargs),
            logits=logits,
            class_logits=class_logits,
            distillation_logits=distillation_logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


__all__ = ["DeiTTiForImageClassification", "DeiTTiImageClassifierOutput", "DeiTTiModel", "DeiTTiPreTrainedModel"]
