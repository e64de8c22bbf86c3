"""BLIP's visual question answering [Li et al. 2022, arXiv:2201.12086], from transformers: how surely is it "yes"?

As T2I-CompBench asks it (models/blip_vqa.py): of the first word of the answer, the share of "yes" against "no". The
question begins with BLIP's own token [ENC] and is cut at 35 tokens; the picture is stretched to a square. The
published scorer stretches to 480 pixels, transformers' conversion of the same weights to 384, which is taken here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from bittern.errors import UserError
from bittern.evaluation import hosted
from bittern.evaluation.clip import to_pixels
from bittern.precision import exact_products
from bittern.threads import is_small, one_thread

if TYPE_CHECKING:
    from PIL import Image

DEFAULT = "Salesforce/blip-vqa-capfilt-large"
OPTION = "--blip"
_LONGEST = 35
_ANSWERS = ("yes", "no")


class Blip:
    """A BLIP that answers questions, and its tokenizer.

    Raises:
        UserError: for a tokenizer without the words "yes" and "no", or a vocabulary without BLIP's own tokens.
    """

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network = network
        self.tokenizer = tokenizer
        answers = tokenizer.convert_tokens_to_ids(list(_ANSWERS))
        self._begin = network.config.text_config.bos_token_id
        # BLIP added [DEC] and then [ENC] behind BERT's words; its config names the first.
        self._ask = self._begin + 1
        if tokenizer.unk_token_id in answers or self._ask >= network.config.text_config.vocab_size:
            raise UserError(f"{OPTION}: the vocabulary has no 'yes', 'no' or [ENC]; expected a BLIP such as {DEFAULT}")
        self._answers = answers
        self._small = is_small(network) and torch.device(network.device).type == "cpu"

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Blip:
        """A BLIP from its folder.

        Raises:
            UserError: for a damaged or another model, or one without its tokenizer.
        """
        from transformers import AutoTokenizer, BlipForQuestionAnswering

        network = hosted.load_model(BlipForQuestionAnswering, folder, OPTION, device)
        return cls(network, hosted.load(AutoTokenizer, folder, OPTION))

    @torch.inference_mode()
    def yes(self, image: Image.Image, questions: Sequence[str]) -> list[float]:
        """The share of "yes" against "no" in the answer to each question about an RGB picture."""
        if not questions:
            return []
        from PIL import Image as Pil

        network = self.network
        side = network.config.vision_config.image_size
        pixels = to_pixels(image.resize((side, side), Pil.Resampling.BICUBIC))[None].to(network.device)
        with exact_products(), one_thread(self._small):
            seen = network.vision_model(pixel_values=pixels).last_hidden_state
            return [self._yes(seen, question) for question in questions]

    def _yes(self, seen: Float[Tensor, "1 patches d"], question: str) -> float:
        # One by one: some versions of transformers do not mask what pads BLIP's questions to one length.
        ids = self.tokenizer(question, truncation=True, max_length=_LONGEST, return_tensors="pt").input_ids
        ids[:, 0] = self._ask
        understood = self.network.text_encoder(input_ids=ids.to(seen.device), encoder_hidden_states=seen)[0]
        begin = torch.tensor([[self._begin]], device=seen.device)
        said = self.network.text_decoder(input_ids=begin, encoder_hidden_states=understood).logits[0, 0]
        return float(said[self._answers].float().softmax(-1)[0])
