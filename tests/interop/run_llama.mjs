// node run_llama.mjs MODEL.gguf [ADAPTER.gguf] < {"chats": [[token, …], …], "most": 32}
// Prints {"answers": [[token, …], …], "ended": [whether the engine stopped by itself, …]}: greedy tokens of llama.cpp, after
// prompts that come as tokens.
import {readFileSync} from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const [modelPath, filePath] = process.argv.slice(2);
const {chats, most} = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath, gpuLayers: 0});
const lora = filePath ? {adapters: [{filePath, scale: 1}]} : undefined;
const answers = [];
const ended = [];
for (const tokens of chats) {
    const context = await model.createContext({contextSize: 1024, lora, threads: 1});
    const answer = [];
    for await (const token of context.getSequence().evaluate(tokens, {temperature: 0})) {
        answer.push(token);
        if (answer.length === most) break;
    }
    answers.push(answer);
    ended.push(answer.length < most); // evaluate() leaves out the end token
    await context.dispose();
}
console.log(JSON.stringify({answers, ended}));
process.exit(0);
