// Runs GGUF models in llama.cpp, by the package node-llama-cpp: node llama_cpp.mjs FOLDER
//
// FOLDER holds node_modules. Each line of the input is a request in JSON, each line of the output
// its answer, or {"error": ...}:
//
//   {"do": "versions"}                                of the package and of llama.cpp
//   {"do": "logits", model, adapters, tokens}         logits (T, V), after each of the tokens
//   {"do": "greedy", model, adapters, tokens, count, stop}
//                                                     the likeliest tokens that follow, up to one of
//                                                     `stop`, and the two likeliest at each step
//   {"do": "tokenize", model, texts, special}         ids of each text
//   {"do": "detokenize", model, tokens}               the text of each list of ids
//
// `adapters` are like {"filePath": ..., "scale": 1}. The optional `kv` is the cache's type, and
// `flashAttention` a boolean. Each request has a new context: adapters change what a cache holds.

import {createRequire} from "node:module";
import path from "node:path";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const folder = path.resolve(process.argv[2]);
const entry = createRequire(path.join(folder, "index.js")).resolve("node-llama-cpp");
const {getLlama, getModuleVersion} = await import(pathToFileURL(entry));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const models = new Map();

async function load(modelPath, vocabOnly = false) {
  const key = `${modelPath} ${vocabOnly}`;
  if (!models.has(key)) models.set(key, await llama.loadModel({modelPath, vocabOnly}));
  return models.get(key);
}

async function withSequence(request, use) {
  const model = await load(request.model);
  const context = await model.createContext({
    contextSize: request.tokens.length + (request.count ?? 0) + 1, // a full one drops old tokens
    threads: 1, // more would wait for each other on a busy machine
    lora: {adapters: request.adapters ?? []},
    flashAttention: request.flashAttention ?? false,
    experimentalKvCacheKeyType: request.kv ?? "F32",
    experimentalKvCacheValueType: request.kv ?? "F32",
  });
  try {
    return await use(context.getSequence());
  } finally {
    await context.dispose();
  }
}

const answers = {
  versions: async () => ({
    versions: {package: await getModuleVersion(), llamaCpp: llama.llamaCppRelease.release},
  }),
  logits: (request) => withSequence(request, async (sequence) => {
    const asked = request.tokens.map((token) => [token, {generateNext: {logits: true}}]);
    const outputs = await sequence.controlledEvaluate(asked);
    const row = (logits) => [...logits].sort(([a], [b]) => a - b).map(([, value]) => value);
    return {logits: outputs.map((output) => row(output.next.logits))};
  }),
  greedy: (request) => withSequence(request, async (sequence) => {
    const generateNext = {
      token: true,
      options: {temperature: 0},
      totalLogitWeight: true, // the sum of exp(logit - largest logit)
      logits: {filter: {tokens: [], includeTop: 2}},
    };
    const stop = request.stop ?? [], tokens = [], top = [];
    let input = request.tokens;
    while (tokens.length < request.count && !stop.includes(tokens.at(-1))) {
      const asked = [...input.slice(0, -1), [input.at(-1), {generateNext}]];
      const {token, logits, totalLogitWeight} = (await sequence.controlledEvaluate(asked)).at(-1).next;
      const largest = Math.max(...logits.values());
      top.push([...logits].map(([id, value]) => [id, Math.exp(value - largest) / totalLogitWeight]));
      tokens.push(token);
      input = [token];
    }
    return {tokens, top};
  }),
  tokenize: async ({model, texts, special}) => {
    const loaded = await load(model, true);
    return {tokens: texts.map((text) => [...loaded.tokenize(text, special ?? false)])};
  },
  detokenize: async ({model, tokens}) => {
    const loaded = await load(model, true);
    return {texts: tokens.map((ids) => loaded.detokenize(ids, true))};
  },
};

for await (const line of createInterface({input: process.stdin})) {
  let answer;
  try {
    const request = JSON.parse(line);
    answer = await answers[request.do](request);
  } catch (error) {
    answer = {error: String(error)};
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
}
process.exit(0);
