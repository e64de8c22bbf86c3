"""The untrained parts that the embedded models share: tokenizers made from the world's own words, a CLIP text encoder,
a VAE."""

from __future__ import annotations

import json
import random

from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Tokenizer

from bittern.evaluation import scenes

IMAGE_SIZE = 128
LATENT_CHANNELS = 16
TEXT_TOKENS = 24
TEXT_WIDTH = 128
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


def clip_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=256,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            # The fused kernels crash in the backward pass of encoders this small.
            attn_implementation="eager",
        )
    )


def autoencoder(widths: tuple[int, ...], norm_groups: int) -> AutoencoderKL:
    """Factor 8 with four widths, 16 latent channels."""
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=norm_groups,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
