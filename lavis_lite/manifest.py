"""Which module registers which name, so that a name is imported when it is first asked for and not before.

A test imports every module named here and checks that it registers exactly these names.
"""

from __future__ import annotations

from lavis_lite.common.registry import registry

MODULES: dict[str, dict[str, list[str]]] = {
    "model": {
        "lavis_lite.models.blip2_qformer": ["blip2", "blip2_feature_extractor", "blip2_image_text_matching"],
        "lavis_lite.models.blip2_generative": ["blip2_opt", "blip2_t5", "blip2_lm"],
        "lavis_lite.worlds.shapes.vit_pretrain": ["shapes_vit_pretrain"],
        "lavis_lite.worlds.shapes.lm_pretrain": ["shapes_lm_pretrain"],
    },
    "vision_encoder": {
        "lavis_lite.models.vision.eva": ["eva_clip_g"],
        "lavis_lite.models.vision.clip": ["clip_L"],
        "lavis_lite.models.vision.timm_encoder": ["timm"],
        "lavis_lite.worlds.shapes.encoder": ["shapes_vit"],
    },
    "language_model": {
        "lavis_lite.models.language.decoder_only": ["opt", "causal_lm"],
        "lavis_lite.models.language.encoder_decoder": ["t5", "seq2seq_lm"],
    },
    "processor": {
        "lavis_lite.processors.image": ["blip2_image_train", "blip_image_train", "blip_image_eval"],
        "lavis_lite.processors.text": ["blip_caption", "blip_question"],
        "lavis_lite.processors.video": ["video"],
        "lavis_lite.worlds.shapes.processors": ["shapes_image_train", "shapes_image_eval"],
    },
    "builder": {
        "lavis_lite.datasets.builders": ["image_text"],
        "lavis_lite.datasets.vqa_builder": ["vqa"],
        "lavis_lite.datasets.shard_builder": ["shards", "vqa_shards"],
        "lavis_lite.datasets.clip_builders": ["video_text", "video_vqa"],
        "lavis_lite.datasets.clip_shards": ["video_shards", "video_vqa_shards"],
        "lavis_lite.worlds.shapes.builder": ["shapes"],
        "lavis_lite.worlds.shapes.clip_builder": ["shapes_video"],
        "lavis_lite.worlds.shapes.vit_data": ["shapes_rendered"],
        "lavis_lite.worlds.shapes.lm_data": ["shapes_documents"],
    },
    "task": {
        "lavis_lite.tasks.pretrain": ["image_text_pretrain", "retrieval"],
        "lavis_lite.tasks.captioning": ["captioning"],
        "lavis_lite.tasks.vqa": ["vqa"],
        "lavis_lite.worlds.shapes.vit_task": ["shapes_probe"],
        "lavis_lite.worlds.shapes.caption_task": ["shapes_captioning"],
        "lavis_lite.worlds.shapes.lm_task": ["shapes_reading"],
    },
    "runner": {"lavis_lite.runners.runner": ["runner_base"]},
    "lr_scheduler": {"lavis_lite.common.optim": ["linear_warmup_cosine_lr"]},
    "strategy": {
        "lavis_lite.parallel.single": ["single"],
        "lavis_lite.parallel.ddp": ["ddp"],
        "lavis_lite.parallel.fsdp2": ["fsdp2"],
        "lavis_lite.parallel.fairscale": ["fairscale"],
    },
}


def declare_all() -> None:
    """Announce every shipped name to the registry; imports nothing."""
    for kind, modules in MODULES.items():
        registry.table(kind).declare({name: module for module, names in modules.items() for name in names})
