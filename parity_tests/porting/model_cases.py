"""Models of torchvision, timm and transformers to port, with random weights and small inputs.

Of consecutive blocks of the same structure two are kept, and fully connected layers of 4096 outputs have 64, so that
the proof of a model takes about a minute. With COVERAGE_WHOLE=1 in the environment they stay as they are.
"""

from __future__ import annotations

import gc
import os
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Outcome = tuple[str, str]
Made = tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]

TIMM = """
resnet10t mobilenetv3_small_050 efficientnet_lite0 deit_tiny_patch16_224 mixer_s32_224 convnext_atto convnextv2_atto
poolformer_s12 edgenext_xx_small mobilevit_xxs ghostnet_050 regnetx_002 repvgg_a0 levit_128s pit_ti_224
xcit_nano_12_p16_224 coat_lite_tiny crossvit_tiny_240 vit_tiny_patch16_224 beit_base_patch16_224 cait_xxs24_224
tinynet_e lcnet_035 hardcorenas_a mnasnet_small fbnetc_100 spnasnet_100 dla46_c densenet121 dpn48b vovnet39a
nf_regnet_b0 resnetv2_50 resnest14d skresnet18 hrnet_w18_small res2net50_14w_8s cspresnet50 darknet17 selecsls42b
tresnet_m rexnetr_100 gernet_s inception_next_atto fastvit_t8 efficientformer_l1 efficientformerv2_s0 mobileone_s0
repghostnet_050 starnet_s1 tiny_vit_5m_224 eva02_tiny_patch14_224 gmlp_ti16_224 resmlp_12_224 focalnet_tiny_srf
visformer_tiny volo_d1_224 twins_svt_small pvt_v2_b0 nest_tiny caformer_s18 davit_tiny sequencer2d_s
maxvit_rmlp_pico_rw_256 hgnet_tiny repvit_m0_9 swiftformer_xs mambaout_femto rdnet_tiny hiera_tiny_224 nextvit_small
convmixer_768_32 efficientvit_b0 efficientvit_m0 ghostnetv2_100 inception_v4 xception41 legacy_seresnet18
botnet26t_256 halonet26t lambda_resnet26t bat_resnext26ts gcresnet33ts eca_halonext26ts swin_tiny_patch4_window7_224
swinv2_cr_tiny_ns_224 coatnet_nano_rw_224 convit_tiny inception_resnet_v2 nasnetalarge pnasnet5large
""".split()  # noqa: SIM905
"""One small model of each family."""

TORCHVISION = """
alexnet resnet18 mobilenet_v2 squeezenet1_1 shufflenet_v2_x0_5 mnasnet0_5 vgg11 vgg11_bn mobilenet_v3_small
efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny densenet121 googlenet inception_v3
swin_t swin_v2_t vit_b_32 resnet50 resnext50_32x4d wide_resnet50_2 maxvit_t segmentation.lraspp_mobilenet_v3_large
segmentation.fcn_resnet50 segmentation.deeplabv3_resnet50 detection.ssdlite320_mobilenet_v3_large
detection.fasterrcnn_mobilenet_v3_large_320_fpn detection.fcos_resnet50_fpn detection.retinanet_resnet50_fpn
detection.ssd300_vgg16 video.r3d_18 video.mc3_18 video.r2plus1d_18 video.swin3d_t video.mvit_v1_b video.mvit_v2_s
video.s3d
""".split()  # noqa: SIM905
"""One small model of each family, which are tried first; the others differ in their sizes."""


def thin(module: nn.Module) -> nn.Module:
    """Removes blocks of a Sequential after the second one of the same structure. Returns the module."""
    for child in list(module.modules()):
        if type(child) is not nn.Sequential:  # the modules of a list may be used side by side
            continue
        kept: list[nn.Module] = []
        for block in child:
            if len(kept) < 2 or not _structure(block) or len({*map(_structure, (*kept[-2:], block))}) > 1:
                kept.append(block)
        if len(kept) < len(child):
            names = [name for name, block in child.named_children() if any(block is item for item in kept)]
            for name in list(child._modules):
                if name not in names:
                    del child._modules[name]
            if all(name.isdigit() for name in names):
                child._modules = {str(index): child._modules[name] for index, name in enumerate(names)}
    for child in list(module.modules()):
        if type(child) is nn.Sequential:
            for number, layer in enumerate(child):
                if type(layer) is nn.Linear and layer.out_features == 4096:
                    child[number] = nn.Linear(64 if layer.in_features == 4096 else layer.in_features, 64)
                elif type(layer) is nn.Linear and layer.in_features == 4096:
                    child[number] = nn.Linear(64, layer.out_features)
    return module


def _structure(block: nn.Module) -> tuple[Any, ...]:
    """Returns types and shapes, by which two blocks are alike; empty for a block without weights."""
    shapes = tuple((name, tuple(value.shape)) for name, value in block.state_dict().items())
    strides = tuple(getattr(item, "stride", None) for item in block.modules())
    return (*(type(item) for item in block.modules()), shapes, str(strides)) if shapes else ()


def torchvision_models() -> dict[str, Callable[[], Made]]:
    """Returns all models for classification, segmentation and video, and the backbones of those for detection."""
    _import_torchvision()
    from torchvision import models

    made: dict[str, Callable[[], Made]] = {}

    def classification(name: str) -> Made:
        size = 96 if name == "inception_v3" else 224 if name == "maxvit_t" else 64
        options: dict[str, Any] = {"image_size": 64 if "14" not in name else 56} if name.startswith("vit_") else {}
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = True
        model = models.get_model(name, weights=None, num_classes=10, **options)
        size = options.get("image_size", size)
        return model, (torch.randn(2, 3, size, size),), {}

    def segmentation(name: str) -> Made:
        model = models.get_model(name, weights=None, weights_backbone=None, num_classes=5)
        return model, (torch.randn(2, 3, 64, 64),), {}

    def detection(name: str) -> Made:
        model = models.get_model(name, weights=None, weights_backbone=None)
        size = 320 if "ssd300" in name else 64
        return model.backbone, (torch.randn(2, 3, size, size),), {}

    def video(name: str) -> Made:
        whole = models.video.mvit.MViT  # its constructors fix the sizes, whose attention has 25,000 positions
        small = {"spatial_size": (64, 64), "temporal_size": 8}
        with unittest.mock.patch.object(models.video.mvit, "MViT", lambda **given: whole(**{**given, **small})):
            model = models.get_model(name, weights=None, num_classes=10)
        shape = (2, 3, 16, 224, 224) if name == "s3d" else (2, 3, 8, 64, 64)
        return model, (torch.randn(*shape),), {}

    groups = [
        (models, classification, ""),
        (models.segmentation, segmentation, "segmentation."),
        (models.detection, detection, "detection."),
        (models.video, video, "video."),
    ]
    for module, make, prefix in groups:
        for name in models.list_models(module=module):
            made[prefix + name] = lambda make=make, name=name: make(name)  # type: ignore[misc]
    first = [name for name in TORCHVISION if name in made]
    return {name: made[name] for name in dict.fromkeys([*first, *made])}


def _import_torchvision() -> None:
    """Imports torchvision. Models need none of the operations of its compiled library, which fits one torch only."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        box, pool = "Tensor x, Tensor rois, float s, SymInt h, SymInt w", "(Tensor, Tensor)"
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define(f"roi_align({box}, int r, bool aligned) -> Tensor")
        library.define(f"roi_pool({box}) -> {pool}")
        library.define(f"ps_roi_align({box}, int r) -> {pool}")
        library.define(f"ps_roi_pool({box}) -> {pool}")
        sizes = ", ".join(f"SymInt {letter}" for letter in "abcdefgh")
        tensors = "Tensor x, Tensor weight, Tensor offset, Tensor mask, Tensor bias"
        library.define(f"deform_conv2d({tensors}, {sizes}, bool i) -> Tensor")
        for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
            library.define(f"_{name}_backward(Tensor x) -> Tensor")
        _KEPT.append(library)
        import torchvision  # noqa: F401


_KEPT: list[Any] = []


def timm_models() -> dict[str, Callable[[], Made]]:
    """Returns one model of each family."""
    _import_torchvision()
    import timm

    def make(name: str) -> Made:
        model = timm.create_model(name, num_classes=10)
        channels, size, _ = model.default_cfg["input_size"]
        if not model.default_cfg.get("fixed_input_size") and not any(
            k in name for k in ("vit_", "halo", "bat_", "bot")
        ):
            size = 96 if "inception" in name or "nasnet" in name else 64
        return model, (torch.randn(2, channels, size, size),), {}

    return {name: lambda name=name: make(name) for name in TIMM if name in timm.list_models()}  # type: ignore[misc]


def transformers_models() -> dict[str, Callable[[], Made]]:
    """Returns a model of each family."""
    import transformers as t

    from icenet_torch.porting.sources import example_of

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = {"image_size": 32, "patch_size": 8, **small}
    text = {"vocab_size": 50, "max_position_embeddings": 16, **small}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    sizes = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))
    }
    whisper = {"d_model": 32, "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 20, **sizes}
    speech = {
        "conv_dim": [32] * 3,
        "conv_stride": [5, 2, 2],
        "conv_kernel": [10, 3, 3],
        "num_conv_pos_embeddings": 16,
    }
    stages = {"hidden_sizes": [16, 32], "depths": [1, 1], "sr_ratios": [2, 1], "num_encoder_blocks": 2}
    segformer = {**stages, "num_attention_heads": [1, 2], "patch_sizes": [7, 3], "strides": [4, 2]}
    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]}
    made: dict[str, Callable[[], nn.Module]] = {
        "BERT": lambda: t.BertModel(t.BertConfig(vocab_size=50, **small)),
        "BERT (masked LM)": lambda: t.BertForMaskedLM(t.BertConfig(vocab_size=50, **small)),
        "GPT-2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64)
        ),
        "Llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(vocab_size=50, num_key_value_heads=1, **small)),
        "T5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
            )
        ),
        "Whisper": lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(vocab_size=50, **whisper, **ids)),
        "CLIP": lambda: t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)),
        "SigLIP": lambda: t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision)),
        "ViT": lambda: t.ViTModel(t.ViTConfig(**vision)),
        "DINOv2": lambda: t.Dinov2Model(t.Dinov2Config(**vision)),
        "Swin": lambda: t.SwinModel(t.SwinConfig(**swin, window_size=4)),
        "SegFormer": lambda: t.SegformerForSemanticSegmentation(
            t.SegformerConfig(decoder_hidden_size=16, mlp_ratios=[2, 2], num_labels=4, **segformer)
        ),
        "Wav2Vec2": lambda: t.Wav2Vec2Model(
            t.Wav2Vec2Config(
                num_feat_extract_layers=3,
                num_conv_pos_embedding_groups=4,
                mask_time_prob=0,
                layerdrop=0,
                **speech,
                **small,
            )
        ),
        "Mamba": lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2)),
    }

    tiny = {"layer_norm_eps": 1e-5, "pad_token_id": 0, **text}
    decoder = {"use_cache": False, **text}
    stages4 = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "image_size": 64}
    heads = {"num_key_value_heads": 1}
    of_gpt = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "use_cache": False}
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    waves = {"conv_dim": [16] * 2, "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
    waves |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0, "layerdrop": 0}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    latent |= {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
    latent |= {"num_experts_per_tok": 2, "first_k_dense_replace": 1}
    others: dict[str, dict[str, Any]] = {
        "Albert": {"embedding_size": 16, **tiny},
        "BigBird": {"attention_type": "original_full", **tiny},
        "Bloom": {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 2, "use_cache": False},
        "CodeGen": {**of_gpt, "n_head": 4, "rotary_dim": 4},
        "Cohere2": {"sliding_window": 4, **heads, **decoder, **tokens},
        "ConvBert": {"embedding_size": 16, **tiny},
        "ConvNext": stages4,
        "CTRL": {**of_gpt, "dff": 64},
        "Deberta": {**relative, **tiny},
        "DebertaV2": {**relative, **tiny},
        "DeepseekV3": {**latent, "num_key_value_heads": 2, **decoder},
        "DeiT": vision,
        "DINOv3ViT": {"num_register_tokens": 2, **vision},
        "Electra": {"embedding_size": 16, **tiny},
        "Esm": {"mask_token_id": 3, "position_embedding_type": "rotary", **tiny},
        "Falcon": decoder,
        "FNet": tiny,
        "Funnel": {"vocab_size": 50, "block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64},
        "Gemma2": {"head_dim": 16, "sliding_window": 8, **heads, **decoder},
        "Gemma3Text": {"head_dim": 16, "sliding_window": 4, **heads, **decoder},
        "GPTJ": {**of_gpt, "rotary_dim": 8},
        "GPTNeoX": decoder,
        "GptOss": {"head_dim": 16, "sliding_window": 4, "num_local_experts": 4, **heads, **decoder},
        "Hubert": {**waves, **small},
        "LayoutLM": {"max_2d_position_embeddings": 64, **tiny},
        "Mistral": {"sliding_window": 4, **heads, **decoder},
        "Mixtral": {"num_local_experts": 4, **heads, **decoder},
        "ModernBert": {"pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 4, **text},
        "Mpt": {"vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 32, "use_cache": False},
        "Nystromformer": {"num_landmarks": 12, "segment_means_seq_len": 12, "conv_kernel_size": 3, **tiny},
        "Olmo2": {**heads, **decoder},
        "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, **decoder},
        "Phi": decoder,
        "PoolFormer": stages4,
        "Qwen2": {**heads, **decoder},
        "Qwen3": {"head_dim": 16, **heads, **decoder},
        "RegNet": {"embedding_size": 8, "groups_width": 8, **stages4},
        "RemBert": {"input_embedding_size": 16, "output_embedding_size": 16, **tiny},
        "Rwkv": {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "use_cache": False},
        "Splinter": tiny,
        "Starcoder2": {**heads, **decoder},
        "SqueezeBert": {"embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2, **tiny},
        "WavLM": {**waves, **small},
        "XLNet": {"vocab_size": 50, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "use_mems_eval": False},
        "Yolos": {"num_detection_tokens": 4, "use_mid_position_embeddings": False, **vision, "image_size": [32, 32]},
    }

    def other(name: str) -> nn.Module:
        config = getattr(t, f"{name}Config")(**others[name])
        made: nn.Module = getattr(t, f"{name}{'Base' if name == 'Funnel' else ''}Model")(config)
        return made

    for name in others:
        made[name] = lambda name=name: other(name)  # type: ignore[misc]

    def make(name: str) -> Made:
        model = made[name]()
        return model, (), example_of(model)

    return {name: lambda name=name: make(name) for name in made}  # type: ignore[misc]


def _runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Returns whether a model can be called."""
    try:
        with torch.no_grad():
            model.eval()(*args, **kwargs)
    except Exception:  # whatever the model's code raises
        return False
    return True


def port(make: Callable[[], Made], is_whole: bool) -> Outcome:
    """Ports a model with its proof."""
    import icenet
    from icenet.core.errors import IceNetError

    gc.collect()
    torch.manual_seed(0)
    try:
        model, args, kwargs = make()
        if not is_whole and not _runs(thin(model), args, kwargs):
            model, args, kwargs = make()
        done = icenet.port(model, args, example_kwargs=kwargs)
    except IceNetError as error:
        text = " ".join(str(error).split())[:500]
        return ("missing" if "no counterpart" in text else "failed"), text
    except Exception as error:
        return "failed", " ".join(f"{type(error).__name__}: {error}".split())[:500]
    modes = sorted({check.mode for check in done.report.checks})
    notes = [" ".join(note.split())[:160] for note in done.report.notes]
    ratio = max(check.ratio for check in done.report.checks)
    return "passed", "; ".join([f"ratio {ratio:.1f}", " and ".join(modes), *notes])


def entries(group: str) -> dict[str, Callable[[], Iterator[Callable[[], Outcome]]]]:
    """Returns the models of a group."""
    found = {"torchvision": torchvision_models, "timm": timm_models, "transformers": transformers_models}[group]()
    is_whole = os.environ.get("COVERAGE_WHOLE") == "1"
    return {name: lambda make=make: iter([lambda: port(make, is_whole)]) for name, make in found.items()}  # type: ignore[misc]
