// Converts text to tokens and back: tokenizer.json, the chat template, and streamed text. As deltamem_tool/chat/text.py.

import { checkUnicode, trimStart } from "./characters.js";
import { DataError, ExportError, firstLine } from "./errors.js";
import { decodeText, isObject, parseJson } from "./json.js";
import { offsetsOf } from "./offsets.js";
import { jinja, tokenizers } from "./packages.js";
import { ChatTemplate } from "./template.js";

const MAX_TOKENIZER_BYTES = 256 * 2 ** 20;
const MAX_TEMPLATE_BYTES = 2 ** 20; // the longest known ones, which render tools, have 20 kB

/** A tokenizer and a chat template, which turn a model's messages into tokens. */
export class ChatText {
  /**
   * @param {Record<string, Uint8Array | undefined>} files of a model folder, by name
   * @returns {Promise<ChatText>}
   * @throws {ExportError} a file cannot be read
   */
  static async load(files) {
    const [{ Tokenizer }, { Template }] = await Promise.all([tokenizers(), jinja()]);
    return new ChatText(files, Tokenizer, Template);
  }

  constructor(files, Tokenizer, Template) {
    const tokenizerJson = readJson(files, "tokenizer.json", MAX_TOKENIZER_BYTES);
    const tokenizerConfig = readJson(files, "tokenizer_config.json");
    try {
      // tokenizer_config.json is left out: it would change texts, and other runtimes only use tokenizer.json.
      this.tokenizer = new Tokenizer(tokenizerJson, {});
    } catch (error) {
      throw damagedError("tokenizer.json", error);
    }
    this._tokenizerJson = tokenizerJson;
    this.ids = new Set(this.tokenizer.get_vocab(true).values());
    this._specialTokens = {};
    for (const [name, token] of Object.entries(tokenizerConfig)) {
      const content = isObject(token) ? token.content : token;
      if (name.endsWith("_token") && typeof content === "string") this._specialTokens[name] = content;
    }
    const source = templateSource(files["chat_template.jinja"], tokenizerConfig.chat_template);
    this.template = source === null ? null : new ChatTemplate("this model", this._compile(source, Template));
  }

  /** Whether the model has a chat template. */
  get hasTemplate() {
    return this.template !== null;
  }

  // Returns a function that renders messages with the template in `source`.
  _compile(source, Template) {
    let template;
    try {
      template = new Template(source);
    } catch (error) {
      throw damagedError("The chat template", error);
    }
    return (messages, generationPrompt) =>
      template.render({ ...this._specialTokens, messages, add_generation_prompt: generationPrompt });
  }

  /**
   * Return the token ids that end an answer.
   *
   * @param {unknown} configured `eos_token_id` of the model's generation config
   * @returns {Set<number>}
   */
  stopTokens(configured) {
    const configuredIds = configured == null ? [] : [configured].flat();
    if (!configuredIds.every(Number.isInteger)) {
      throw damagedError("generation_config.json", "its eos_token_id is not a number or a list of them");
    }
    const ids = [...configuredIds, this.tokenizer.token_to_id(this._specialTokens.eos_token ?? "")];
    if (this.hasTemplate) {
      // If the template ends an answer with plain text, that text could be part of an answer.
      const [first] = this.encode(trimStart(this.template.closing()));
      if (this.tokenizer.get_added_tokens_decoder().has(first)) ids.push(first);
    }
    return new Set(ids.filter((id) => id !== undefined));
  }

  /**
   * Render the conversation as text; with `generationPrompt`, up to where the assistant speaks next.
   *
   * @param {import("./template.js").Message[]} messages
   * @param {boolean} [generationPrompt]
   * @returns {string}
   * @throws {ExportError} there is no template, or it rejects the messages
   * @throws {DataError} a message has no role or no text, or the template leaves out a content
   */
  render(messages, generationPrompt = true) {
    if (!this.hasTemplate) {
      throw new ExportError("This model does not take messages.", "It has no chat template.", "Give it plain text instead.");
    }
    return this.template.render(messages, generationPrompt);
  }

  /**
   * Return token ids. `specialTokens` lets the tokenizer add its own, which templates write themselves.
   *
   * @param {string} text
   * @param {boolean} [specialTokens]
   * @returns {number[]}
   * @throws {DataError} the text is not valid Unicode
   */
  encode(text, specialTokens = false) {
    checkUnicode(text, "The text");
    return text === "" && !specialTokens ? [] : this.tokenizer.encode(text, { add_special_tokens: specialTokens }).ids;
  }

  /**
   * Return the character range of each token of `text`.
   *
   * @param {string} text
   * @returns {[number, number][]} start and end, in UTF-16 units
   * @throws {DataError} the positions of the tokens cannot be found
   */
  offsets(text) {
    const { tokens } = this.tokenizer.encode(text, { add_special_tokens: false });
    return offsetsOf(text, tokens, this._tokenizerJson);
  }

  /**
   * Return the text of token ids, without special tokens.
   *
   * @param {number[]} ids
   * @returns {string}
   */
  decode(ids) {
    const options = { skip_special_tokens: true, clean_up_tokenization_spaces: false };
    return ids.length ? this.tokenizer.decode(ids, options) : "";
  }
}

/** Converts tokens to text incrementally. A character appears only when all of its bytes are known. */
export class TextStream {
  /** @param {ChatText} text */
  constructor(text) {
    this._text = text;
    this._tokens = [];
    this._start = 0; // decoding starts at this token: the last ones returned are the context of the next
    this._end = 0; // the text of the tokens before this one has been returned
  }

  /**
   * Return the text that `token` completes, which is often empty.
   *
   * @param {number} token
   * @returns {string}
   */
  push(token) {
    this._tokens.push(token);
    return this._new(true);
  }

  /** Return the remaining text when no more tokens follow. */
  flush() {
    return this._new(false);
  }

  _new(hold) {
    const before = this._text.decode(this._tokens.slice(this._start, this._end));
    const text = this._text.decode(this._tokens.slice(this._start));
    if (hold && (text.length <= before.length || text.endsWith("\ufffd"))) return "";
    [this._start, this._end] = [this._end, this._tokens.length];
    return text.slice(before.length);
  }
}

/**
 * Read a JSON object from a model folder.
 *
 * @param {Record<string, Uint8Array | undefined>} files of the folder, by name
 * @param {string} name
 * @param {number} [limit] maximum size in bytes
 * @returns {Record<string, unknown>} the object; empty if there is no such file
 * @throws {ExportError} the file is not JSON, or not a JSON object
 */
export function readJson(files, name, limit) {
  if (files[name] === undefined) return {};
  let content;
  try {
    content = parseJson(files[name], { finite: false, limit });
  } catch (error) {
    throw damagedError(name, error);
  }
  if (!isObject(content)) throw damagedError(name, "it is not a JSON object");
  return content;
}

// Returns the template's source, or null. `file` is the content of chat_template.jinja, and `configured` the template in
// tokenizer_config.json. If there are several, it is the one named default.
function templateSource(file, configured) {
  if (file !== undefined) {
    try {
      return decodeText(file, MAX_TEMPLATE_BYTES);
    } catch (error) {
      throw damagedError("The chat template", error);
    }
  }
  const template = Array.isArray(configured) ? configured.find((entry) => entry?.name === "default")?.template : configured;
  const source = isObject(template) ? template.default : template;
  return typeof source === "string" ? source : null;
}

const damagedError = (part, why) =>
  new ExportError(`${part} of this model folder cannot be read.`, `${firstLine(why)}.`, "Export the model again.");
