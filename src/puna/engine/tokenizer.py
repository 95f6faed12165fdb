"""Tokenizer: a checkpoint's tokenizer, text to ids and back, and prompts from chat messages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from puna.checkpoints.engine_directory import GGUF_TOKENIZER
from puna.engine.chat_template import ChatTemplate
from puna.engine.detokenizer import DecodeStream, Piece, SentencePieceStream, make_stream_factory
from puna.engine.gguf_tokenizer import GGUFTokenizer
from puna.engine.isolated_template import IsolatedTemplate
from puna.engine.sentencepiece_model import SPACE, PieceType, SentencePieceModel

_SURROGATE = re.compile("[\ud800-\udfff]")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in text before the model sees it; `special` ones only where the caller asks."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False

    @classmethod
    def from_json(cls, value: Any, source: Path, special: bool) -> AddedToken:
        """Reads a string or a serialised AddedToken."""
        if isinstance(value, str):
            return cls(value, special)
        if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
            raise ValueError(f"{source}: {value!r} is no token; expected a string or an object with 'content'")
        return cls(
            content=value["content"],
            special=special or bool(value.get("special", False)),
            lstrip=bool(value.get("lstrip", False)),
            rstrip=bool(value.get("rstrip", False)),
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """What tokenizer_config.json and the files around it say."""

    named_tokens: Mapping[str, AddedToken]
    extra_special_tokens: tuple[AddedToken, ...]
    added_tokens: Mapping[int, AddedToken]
    add_bos_token: bool | None
    add_eos_token: bool | None
    legacy: bool | None
    chat_templates: Mapping[str, str]

    @classmethod
    def from_folder(cls, folder: Path) -> TokenizerConfig:
        path = folder / "tokenizer_config.json"
        raw = _read_json_object(path)
        added = {
            int(i): AddedToken.from_json(token, path, False) for i, token in raw.get("added_tokens_decoder", {}).items()
        }
        if not added:
            # Older checkpoints: these two files instead, and the first wins over the config.
            raw = {**raw, **_read_json_object(folder / "special_tokens_map.json")}
            ids = _read_json_object(folder / "added_tokens.json")
            added = {int(token_id): AddedToken(content, False) for content, token_id in ids.items()}
        extra = raw.get("extra_special_tokens") or raw.get("additional_special_tokens") or []
        names = [*_NAMED_TOKENS, *(key for key in raw if key.endswith("_token") and isinstance(raw[key], (str, dict)))]
        named = {name: AddedToken.from_json(raw[name], path, True) for name in names if raw.get(name) is not None}
        if isinstance(extra, Mapping):
            named |= {name: AddedToken.from_json(token, path, True) for name, token in extra.items()}
            extra = []
        return cls(
            named_tokens=named,
            extra_special_tokens=tuple(AddedToken.from_json(token, path, True) for token in extra),
            added_tokens=added,
            add_bos_token=_read_bool(raw, "add_bos_token", path),
            add_eos_token=_read_bool(raw, "add_eos_token", path),
            legacy=_read_bool(raw, "legacy", path),
            chat_templates=_read_chat_templates(folder, raw.get("chat_template"), path),
        )

    def refuse_unknown(self, token_to_id: Callable[[str], int | None], path: Path) -> None:
        """Raises ValueError, naming them, if the tokenizer file `path` lacks tokens that are called special here."""
        tokens = [*self.named_tokens.items(), *(("special token", token) for token in self.extra_special_tokens)]
        missing = [f"{name} {token.content!r}" for name, token in tokens if token_to_id(token.content) is None]
        if missing:
            raise ValueError(
                f"{path} does not know {', '.join(missing)}; correct tokenizer_config.json (or "
                "special_tokens_map.json) beside it, or take the tokenizer file that belongs to them"
            )


def _read_bool(raw: Mapping[str, Any], name: str, path: Path) -> bool | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{path}: {name} is {value!r}; expected true or false")
    return value


def _read_json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON (truncated?): {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected an object")
    return value


def _read_chat_templates(folder: Path, in_config: Any, config_path: Path) -> dict[str, str]:
    # Files of their own replace whatever the config has.
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if in_config is None:
        return {}
    if isinstance(in_config, str):
        return {"default": in_config}
    entries = in_config if isinstance(in_config, list) else []
    templates = {e["name"]: e["template"] for e in entries if isinstance(e, dict) and {"name", "template"} <= e.keys()}
    if not templates or len(templates) != len(entries):
        raise ValueError(f"{config_path}: chat_template must be a string or a list of objects with name and template")
    return templates


class _Backend(Protocol):
    """One kind of tokenizer file. `encode` adds no BOS or EOS; that is what the prefix and suffix are for."""

    prefix: list[int]
    suffix: list[int]
    named_ids: dict[str, int]  # bos_token and so on
    special_ids: frozenset[int]
    vocab_size: int

    def encode(self, text: str, parse_special: bool) -> list[int]: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str | None: ...
    def decode_stream(self, skip_special_tokens: bool) -> DecodeStream: ...


class _JsonBackend:
    """A tokenizer.json, run by the `tokenizers` library.

    Two `tokenizers` objects share the model: one finds special tokens in text and one does not. Switching the flag of
    one object instead would be a race between threads.
    """

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        try:
            parsing = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises bare Exceptions for every malformed file.
            raise ValueError(f"cannot read {path} (truncated or not a tokenizer.json?): {error}") from error
        parsing.no_truncation()
        parsing.no_padding()
        model = parsing.model
        if isinstance(model, tokenizers.models.BPE):
            model.dropout = None
        for token_id, token in sorted(config.added_tokens.items()):
            if parsing.token_to_id(token.content) is None:
                _add_to(parsing, token)
                if parsing.token_to_id(token.content) != token_id:
                    raise ValueError(
                        f"{path} lacks the added token {token.content!r} (id {token_id}) of tokenizer_config.json"
                    )
        config.refuse_unknown(parsing.token_to_id, path)
        special = {known.content for known in parsing.get_added_tokens_decoder().values() if known.special}
        for token in (*config.named_tokens.values(), *config.extra_special_tokens):
            if token.content not in special:
                _add_to(parsing, token)
        self._parsing = parsing
        added = sorted(parsing.get_added_tokens_decoder().items())
        self.special_ids = frozenset(token_id for token_id, known in added if known.special)
        self.vocab_size = max(
            [parsing.get_vocab_size(with_added_tokens=True), *(token_id + 1 for token_id, _ in added)]
        )

        plain = tokenizers.Tokenizer(model)
        plain.normalizer = parsing.normalizer
        plain.pre_tokenizer = parsing.pre_tokenizer
        for _, known in added:
            _ = plain.add_special_tokens([known]) if known.special else plain.add_tokens([known])
        plain.encode_special_tokens = True
        self._plain = plain
        self.prefix, self.suffix = _post_processor_ids(parsing)
        named_ids = {name: parsing.token_to_id(token.content) for name, token in config.named_tokens.items()}
        self.named_ids = {name: token_id for name, token_id in named_ids.items() if token_id is not None}
        # The unknown token may come out of plain text; any other special one only if the model itself can spell it.
        self._forbidden_ids = self.special_ids - {self.named_ids.get("unk_token")}
        contents = sorted((known.content for _, known in added if known.special and len(known.content) > 1), key=len)
        self._spelled = re.compile("|".join(map(re.escape, reversed(contents)))) if contents else None
        decoder = json.loads(parsing.decoder.__getstate__()) if parsing.decoder is not None else None
        try:
            self._make_stream = make_stream_factory(decoder, parsing.id_to_token)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def encode(self, text: str, parse_special: bool) -> list[int]:
        if parse_special:
            return self._parsing.encode(text, add_special_tokens=False).ids
        ids = self._plain.encode(text, add_special_tokens=False).ids
        return ids if self._forbidden_ids.isdisjoint(ids) else self._encode_cut(text)

    def _encode_cut(self, text: str) -> list[int]:
        """For models whose vocabulary has a special token as an ordinary piece (Unigram): cuts the text inside each."""
        cuts = [match.start() + 1 for match in self._spelled.finditer(text)] if self._spelled is not None else []
        ids: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += self._plain.encode(text[start:end], add_special_tokens=False).ids
        found = self._forbidden_ids.intersection(ids)
        if found:
            token = self.id_to_token(min(found))
            raise ValueError(f"the text spells the special token {token!r}, which this tokenizer cannot encode as text")
        return ids

    def token_to_id(self, token: str) -> int | None:
        return self._parsing.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._parsing.id_to_token(token_id) if token_id >= 0 else None

    def decode_stream(self, skip_special_tokens: bool) -> DecodeStream:
        return self._make_stream(self.special_ids.__contains__ if skip_special_tokens else _never)


def _never(token_id: int) -> bool:
    return False


def _add_to(tokenizer: tokenizers.Tokenizer, token: AddedToken) -> None:
    added = tokenizers.AddedToken(
        token.content, special=token.special, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False
    )
    _ = tokenizer.add_special_tokens([added]) if token.special else tokenizer.add_tokens([added])


def _post_processor_ids(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text."""
    for probe in ("a", "A", "0", " ", "the"):
        encoding = tokenizer.encode(probe, add_special_tokens=False)
        if encoding.ids:
            processed = tokenizer.post_process(encoding)
            mask = processed.special_tokens_mask
            first = mask.index(0) if 0 in mask else 0
            return processed.ids[:first], processed.ids[first + len(encoding.ids) :]
    return [], []


class _SentencePieceBackend:
    """A sentencepiece tokenizer.model, with BOS and EOS as Llama's own code adds them."""

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        self._model = model = SentencePieceModel.from_file(path)
        self._tokens = {i: piece.text for i, piece in enumerate(model.pieces)}
        self._ids = {piece.text: i for i, piece in reversed(list(enumerate(model.pieces)))}
        tokens = {
            i: AddedToken(piece.text, True)
            for i, piece in enumerate(model.pieces)
            if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)
        }
        for token_id, token in sorted(config.added_tokens.items()):
            known = self._ids.get(token.content)
            if known is None and token_id not in self._tokens:
                self._tokens[token_id] = token.content
                self._ids[token.content] = known = token_id
            if known != token_id:
                raise ValueError(f"{path} does not have the added token {token.content!r} with id {token_id}")
            if token_id >= len(model.pieces) or token.special:
                tokens[token_id] = token
        config.refuse_unknown(self._ids.get, path)
        for token in (*config.named_tokens.values(), *config.extra_special_tokens):
            tokens[self._ids[token.content]] = token
        # Not the unknown piece: sentencepiece shows it in decoded text.
        self.special_ids = frozenset(i for i, token in tokens.items() if token.special and i != model.unk_id)
        self.vocab_size = max(self._tokens) + 1
        self._always_found = _added_token_pattern(token for token in tokens.values() if not token.special)
        self._all_found = _added_token_pattern(tokens.values())
        # "legacy": false of a Llama tokenizer_config means that only text at the very start gets the dummy prefix.
        self._prefixes_every_text = config.legacy is not False
        defaults = {"bos_token": model.bos_id, "eos_token": model.eos_id, "pad_token": model.pad_id}
        configured = {name: self._ids[token.content] for name, token in config.named_tokens.items()}
        self.named_ids = {
            name: i for name, i in (defaults | {"unk_token": model.unk_id} | configured).items() if i is not None
        }
        bos, eos = self.named_ids.get("bos_token"), self.named_ids.get("eos_token")
        self.prefix = [bos] if bos is not None and config.add_bos_token is not False else []
        self.suffix = [eos] if eos is not None and config.add_eos_token else []

    def encode(self, text: str, parse_special: bool) -> list[int]:
        pattern = self._all_found if parse_special else self._always_found
        if pattern is None:
            return self._model.encode(text)
        ids: list[int] = []
        start = 0
        for match in pattern.finditer(text):
            ids += self._encode_part(text[start : match.start()], is_first=start == 0)
            token_id = self._ids.get(match.group(match.lastgroup or 0))
            if token_id is not None:
                ids.append(token_id)
            start = match.end()
        return ids + self._encode_part(text[start:], is_first=start == 0)

    def _encode_part(self, text: str, is_first: bool) -> list[int]:
        return self._model.encode(text, dummy_prefix=is_first or self._prefixes_every_text)

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokens.get(token_id)

    def decode_stream(self, skip_special_tokens: bool) -> DecodeStream:
        pieces, added = self._model.pieces, self._tokens
        spec = self._model.normalizer_spec
        skipped = self.special_ids if skip_special_tokens else frozenset()
        unk_surface = self._model.unk_surface

        def lookup(token_id: int) -> Piece:
            if token_id in skipped or token_id not in added:
                return None
            if token_id >= len(pieces):
                return added[token_id]
            piece = pieces[token_id]
            if piece.type is PieceType.BYTE:
                return int(piece.text[3:5], 16)
            return unk_surface if piece.type is PieceType.UNKNOWN else piece.text

        return SentencePieceStream(
            lookup, SPACE, spec.add_dummy_prefix or spec.remove_extra_whitespaces, spec.remove_extra_whitespaces
        )


def _added_token_pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str] | None:
    """Finds the longest of the tokens at the leftmost place; each alternative's named group holds the bare token."""
    longest_first = sorted(
        (token for token in tokens if token.content), key=lambda token: len(token.content), reverse=True
    )
    alternatives = [
        (r"\s*" if token.lstrip else "") + f"(?P<t{i}>{re.escape(token.content)})" + (r"\s*" if token.rstrip else "")
        for i, token in enumerate(longest_first)
    ]
    return re.compile("|".join(alternatives)) if alternatives else None


class Tokenizer:
    """Text to token ids and back, for one checkpoint. Safe to use from several threads.

    Made by `from_pretrained`. `prefix` and `suffix` ids (BOS, EOS) are those the checkpoint adds to every text.
    """

    def __init__(self, backend: _Backend, chat_templates: Mapping[str, str]) -> None:
        self._backend = backend
        self.special_ids: frozenset[int] = backend.special_ids
        self._special_tokens = special_tokens = {
            name: token
            for name, token_id in backend.named_ids.items()
            if (token := backend.id_to_token(token_id)) is not None
        }
        self.chat_template: ChatTemplate | None = (
            ChatTemplate(chat_templates, special_tokens) if chat_templates else None
        )

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Tokenizer:
        """Reads tokenizer.json, else a sentencepiece tokenizer.model, and the configuration beside it; or, where
        `folder` is a GGUF file or an engine directory that was built of one, what is in that.

        Raises ValueError, naming the file, for a folder without a tokenizer, a damaged or unsupported file, or special
        tokens that the tokenizer does not know.
        """
        folder = Path(folder)
        if folder.is_file():
            return cls._from_gguf(folder)
        if (folder / GGUF_TOKENIZER).is_file():
            return cls._from_gguf(folder / GGUF_TOKENIZER)
        json_path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
        if not json_path.is_file() and not model_path.is_file():
            raise ValueError(
                f"no tokenizer in {folder}: looked for tokenizer.json and tokenizer.model; copy them from the "
                "checkpoint that the weights came from"
            )
        config = TokenizerConfig.from_folder(folder)
        backend: _Backend = (
            _JsonBackend(json_path, config) if json_path.is_file() else _SentencePieceBackend(model_path, config)
        )
        try:
            return cls(backend, config.chat_templates)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    @classmethod
    def _from_gguf(cls, path: Path) -> Tokenizer:
        backend = GGUFTokenizer(path)
        try:
            return cls(backend, backend.chat_templates)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """The number of ids, including added tokens (the highest id plus one)."""
        return self._backend.vocab_size

    @property
    def bos_token_id(self) -> int | None:
        return self._backend.named_ids.get("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._backend.named_ids.get("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._backend.named_ids.get("pad_token")

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: add BOS (and EOS) where the checkpoint does; not a second BOS if a parsed text has one.
            parse_special: take text such as `</s>` for the special token. Only for text that is trusted, such as a
                rendered chat template; otherwise it is encoded as the characters it is made of. Added tokens that are
                not special (such as `<tool_call>` of some models) are found either way.
        """
        if _SURROGATE.search(text):
            raise ValueError(
                "the text has half a surrogate pair, which no UTF-8 text can have; decode it with errors='replace'"
            )
        ids = self._backend.encode(text, parse_special)
        if not add_special_tokens:
            return ids
        prefix = self._backend.prefix
        has_bos = parse_special and bool(prefix) and prefix == [self.bos_token_id] and ids[:1] == prefix
        return [*([] if has_bos else prefix), *ids, *self._backend.suffix]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids outside of the vocabulary stand for nothing; broken UTF-8 becomes U+FFFD."""
        stream = self.decode_stream(skip_special_tokens)
        return "".join(map(stream.push, token_ids)) + stream.flush()

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """A decoder that takes ids one by one; `Detokenizer` is the class to use it through."""
        return self._backend.decode_stream(skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._backend.id_to_token(token_id)

    def isolated_chat_template(self, source: str) -> ChatTemplate:
        """A template of a stranger's, with this tokenizer's special tokens. ValueError if it is none."""
        return IsolatedTemplate(source, self._special_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation; see `ChatTemplate.render`. ValueError if there is no chat template."""
        if self.chat_template is None:
            raise ValueError(
                "this checkpoint has no chat template; give the prompt as text, or add a "
                "chat_template.jinja to its folder"
            )
        return self.chat_template.render(
            messages, tools, add_generation_prompt, continue_final_message, template_variables
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation: only the BOS and other special tokens that the template itself writes."""
        text = self.render_chat(messages, tools, add_generation_prompt, continue_final_message, template_variables)
        return self.encode(text, add_special_tokens=False, parse_special=True)
