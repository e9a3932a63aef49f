// Streams an answer: node generate.mjs ADDRESS QUESTION
//
// The text goes to standard output as it comes, why it ended to standard error.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const protos = process.env.QWIRE_PROTOS ?? fileURLToPath(new URL("../../protos", import.meta.url));
const definition = loadSync("qwire/v1/generation.proto", {
  includeDirs: [protos],
  longs: String,
  enums: String,
  oneofs: true,
  defaults: true,
});
const { GenerationService } = grpc.loadPackageDefinition(definition).qwire.v1;

const [address = "127.0.0.1:50051", question = "What is the capital of France?"] = process.argv.slice(2);
// What may be sent again, and when: the file that qwire's own clients use.
const serviceConfig = readFileSync(`${protos}/../qwire/service_config.json`, "utf8");
const client = new GenerationService(address, grpc.credentials.createInsecure(), {
  "grpc.service_config": serviceConfig,
  "grpc.per_rpc_retry_buffer_size": 8 * 1024 * 1024,
});
const stream = client.Generate({
  chat: { messages: [{ role: "ROLE_USER", content: question }] },
  sampling: { temperature: 0 },
  stop: { maxTokens: 64 },
});
stream.on("data", (message) => {
  if (message.event === "delta") process.stdout.write(message.delta.text);
  if (message.event === "finished") {
    const { reason, usage } = message.finished;
    process.stderr.write(`${reason}, ${usage.generatedTokens} tokens\n`);
  }
});
stream.on("error", (error) => {
  console.error(error.message);
  process.exitCode = 1;
});
stream.on("end", () => client.close());
