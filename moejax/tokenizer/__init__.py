"""Text to tokens and back: the tokenizer and the chat template that lie beside a checkpoint's weights."""

from moejax.tokenizer.chat_template import ChatTemplate, encode_chat, load_chat_template
from moejax.tokenizer.tokenizer import Tokenizer, load_tokenizer, text_pieces

__all__ = ["ChatTemplate", "Tokenizer", "encode_chat", "load_chat_template", "load_tokenizer", "text_pieces"]
