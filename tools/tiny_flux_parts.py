"""The untrained parts of tiny-flux: tokenizers made from the world's own words, encoders, VAE, transformer."""

from __future__ import annotations

import json
import random

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from bittern.evaluation import scenes

IMAGE_SIZE = 128
TEXT_TOKENS = 24
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer with one piece for each of the world's words, and letters for everything else."""
    words = sorted({word for prompt in scenes.every_prompt() for word in prompt.prompt.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -4.0) for word in words if len(word) > 1]
    pieces += [(letter, -10.0) for letter in LETTERS] + [("▁a", -4.0)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer learned from the world's own sentences, in CLIP's conventions."""
    sentences = random.Random(0).sample([prompt.prompt for prompt in scenes.every_prompt()], 5000)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=list(LETTERS), show_progress=False
    )
    bpe.train_from_iterator(sentences, trainer)
    learned = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = list(dict.fromkeys([*alphabet, *("".join(merge) for merge in learned)]))
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=learned, model_max_length=TEXT_TOKENS)


def build_pipeline(seed: int = 0) -> FluxPipeline:
    """The whole pipeline with random weights, float32, eval mode."""
    torch.manual_seed(seed)
    clip_tok, t5_tok = clip_tokenizer(), t5_tokenizer()
    # Eager attention: T5's additive bias through the fused kernels crashes in the backward pass.
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tok),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=clip_tok.bos_token_id,
            eos_token_id=clip_tok.eos_token_id,
            pad_token_id=clip_tok.pad_token_id,
            attn_implementation="eager",
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tok),
            d_model=128,
            d_kv=32,
            d_ff=384,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            attn_implementation="eager",
        )
    )
    vae = AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=16,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tok,
        text_encoder_2=t5,
        tokenizer_2=t5_tok,
        transformer=transformer,
    )
    _initialise(transformer)
    for part in (clip, t5, vae, transformer):
        part.eval()
    return pipe


def _initialise(transformer: FluxTransformer2DModel) -> None:
    # adaLN-zero: every block starts as the identity, and the last layer predicts zero. [Peebles & Xie 2022]
    for name, module in transformer.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if name == "proj_out" or (".norm" in f".{name}" and name.endswith("linear")):
            torch.nn.init.zeros_(module.weight)
        elif "time_text_embed" in name:
            torch.nn.init.normal_(module.weight, std=0.02)
        else:
            torch.nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            torch.nn.init.zeros_(module.bias)
