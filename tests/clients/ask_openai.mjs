// The `openai` package for Node over a running server: `node ask_openai.mjs URL MODEL NODE_FOLDER`; prints JSON.
import { createRequire } from "node:module";

const [url, model, folder] = process.argv.slice(2);
const { OpenAI, BadRequestError } = createRequire(folder + "/")("openai");
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "I want you to act as a motivational coach." }];
const tools = [{ type: "function", function: { name: "f", parameters: { type: "object" } } }];

const text = await client.completions.create({ model, prompt: "There are two", max_tokens: 5, temperature: 0, logprobs: 1 });
const chat = await client.chat.completions.create({
  model, messages, max_completion_tokens: 5, temperature: 0, logprobs: true, top_logprobs: 2, tools, tool_choice: "none",
});
let streamed = "";
let usage = null;
const stream = await client.chat.completions.create({
  model, messages, max_completion_tokens: 5, temperature: 0, stream: true, stream_options: { include_usage: true },
});
for await (const event of stream) {
  streamed += event.choices[0]?.delta?.content ?? "";
  usage = event.usage ?? usage;
}
const schema = { type: "object", properties: { mood: { enum: ["good", "bad"] } }, required: ["mood"] };
const shaped = await client.chat.completions.create({
  model, messages, temperature: 0, max_completion_tokens: 60,
  response_format: { type: "json_schema", json_schema: { name: "mood", strict: true, schema } },
});
let refused = null;
try {
  await client.chat.completions.create({ model, messages: [{ role: "user", content: "two ".repeat(9000) }] });
} catch (error) {
  refused = { isBadRequest: error instanceof BadRequestError, code: error.code, message: error.message };
}
const models = [];
for await (const each of client.models.list()) models.push(each.id);
console.log(JSON.stringify({ text, chat, streamed, usage, shaped: shaped.choices[0].message.content, refused, models }));
