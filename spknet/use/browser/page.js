// Recordings in a list, each with its embedding; two make a verdict, more a map. Names are only ever set as textContent.
"use strict";
const $ = (id) => document.getElementById(id);
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name);
let about = {}, recordings = [];

async function ask(path, body) {
  const answer = await fetch(path, body === undefined ? {} : { method: "POST", body });
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

function say(text, error) {
  $("said").textContent = text;
  $("said").className = error ? "error" : "about";
}

function element(kind, text, className) {
  const made = document.createElement(kind);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

async function add(files) {
  say("");
  for (const file of files) {
    // Refused here too, so that the browser does not send what the server would not read.
    if (file.size > about.limit) { say(`${file.name}: larger than ${about.limit / 2 ** 20} MiB, the limit of an upload`, true); continue; }
    if (!file.size) { say(`${file.name} is empty: it has no bytes`, true); continue; }
    say(`listening to ${file.name} ...`);
    try {
      const heard = await ask("/recording?name=" + encodeURIComponent(file.name), file);
      recordings.push({ name: file.name, ...heard });
      say("");
    } catch (error) { say(error.message, true); }
    await show();
  }
}

async function show() {
  $("recordings").replaceChildren(...recordings.map(card));
  $("verdict").hidden = $("map").hidden = true;
  if (recordings.length < 2) return;
  const given = recordings.map(({ name, vector, rate }) => ({ name, vector, rate }));
  const found = await ask("/scores", JSON.stringify({ recordings: given }));
  if (found.verdict) showVerdict(found.verdict); else showMap(found.points);
}

function card(one) {
  const box = element("div", "", "recording"), head = element("header", ""), away = element("button", "×"), canvas = element("canvas", "");
  away.title = "take away";
  away.onclick = () => { recordings = recordings.filter((other) => other !== one); show(); };
  head.append(element("b", one.name), element("span", `${one.seconds.toFixed(2)} s, ${one.rate} Hz`, "about"), away);
  canvas.width = 1600; canvas.height = 120;
  const pen = canvas.getContext("2d"), wide = canvas.width / one.wave.length;
  const loudest = Math.max(0.01, ...one.wave.flat().map(Math.abs));
  pen.fillStyle = ink("target");
  one.wave.forEach(([low, high], i) => pen.fillRect(i * wide, 60 - 58 * high / loudest, wide * 0.8, 2 + 58 * (high - low) / loudest));
  box.append(head, canvas, ...one.doubts.map((text) => element("div", text, "doubt")));
  return box;
}

function showVerdict(verdict) {
  $("verdict").hidden = false;
  $("answer").textContent = { true: "the same speaker", false: "different speakers", null: "undecided: no threshold" }[verdict.same];
  const figures = [`score ${verdict.score.toFixed(3)}`];
  if (verdict.probability !== null) figures.push(`probability of one speaker ${verdict.probability.toFixed(3)}`);
  if (verdict.threshold !== null) figures.push(`same from ${verdict.threshold.toFixed(3)} on`);
  $("figures").textContent = figures.join(" · ");
  $("doubts").replaceChildren(...[...verdict.why, about.uncalibrated].filter(Boolean).map((text) => element("div", text, "doubt")));
  $("histogram").hidden = !about.histogram;
  if (about.histogram) drawHistogram(verdict.score);
}

function drawHistogram(score) {
  const { edges, targets, nontargets } = about.histogram, canvas = $("histogram"), pen = canvas.getContext("2d");
  const low = Math.min(edges[0], score), high = Math.max(edges[edges.length - 1], score), floor = canvas.height - 60;
  const x = (value) => 20 + (canvas.width - 40) * (value - low) / (high - low);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.font = "24px system-ui, sans-serif";
  // Each kind's share of its own trials, so that the few targets are seen beside the many others.
  for (const [counts, colour, text, row] of [[nontargets, ink("other"), "different speakers", 0], [targets, ink("target"), "one speaker", 1]]) {
    const most = Math.max(1, ...counts);
    pen.globalAlpha = 0.6;
    pen.fillStyle = colour;
    counts.forEach((count, i) => pen.fillRect(x(edges[i]), floor - (floor - 50) * count / most, x(edges[i + 1]) - x(edges[i]) - 1, (floor - 50) * count / most));
    pen.globalAlpha = 1;
    pen.textAlign = "left";
    pen.fillText(`development trials of ${text}`, 20 + 560 * row, 28);
  }
  pen.fillStyle = pen.strokeStyle = ink("dim");
  pen.textAlign = "center";
  for (let tick = Math.ceil(low * 5) / 5; tick <= high; tick += 0.2) pen.fillText(tick.toFixed(1), x(tick), canvas.height - 8);
  const line = (value, text, colour, dashes, wide, height) => {
    pen.setLineDash(dashes);
    pen.strokeStyle = pen.fillStyle = colour;
    pen.lineWidth = wide;
    pen.beginPath(); pen.moveTo(x(value), 50); pen.lineTo(x(value), floor); pen.stroke();
    pen.textAlign = x(value) > canvas.width - 200 ? "right" : "left";
    const place = x(value) + (pen.textAlign === "left" ? 8 : -8), size = pen.measureText(text).width;
    pen.fillStyle = "#fffc";  // behind the words
    pen.fillRect(pen.textAlign === "left" ? place : place - size, height - 22, size, 28);
    pen.fillStyle = colour;
    pen.fillText(text, place, height);
  };
  line(about.threshold, "threshold", ink("dim"), [8, 8], 3, 74);
  line(score, "this pair", ink("ink"), [], 5, 104);
}

function showMap(points) {
  $("map").hidden = false;
  const canvas = $("points"), pen = canvas.getContext("2d");
  const middle = (k) => (Math.min(...points.map((p) => p[k])) + Math.max(...points.map((p) => p[k]))) / 2;
  const centre = [middle(0), middle(1)];
  const scale = Math.min(...[0, 1].map((k) => (k ? 430 : 600) / Math.max(1e-6, ...points.map((p) => Math.abs(p[k] - centre[k])))));
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.font = "26px system-ui, sans-serif";
  points.forEach((point, i) => {
    const [x, y] = [820 + scale * (point[0] - centre[0]), 500 + scale * (point[1] - centre[1])];
    pen.fillStyle = ink("target");
    pen.beginPath(); pen.arc(x, y, 11, 0, 7); pen.fill();
    pen.fillStyle = ink("ink");
    pen.textAlign = x > 1300 ? "right" : "left";
    pen.fillText(recordings[i].name.slice(0, 40), x + (x > 1300 ? -20 : 20), y + 9);
  });
}

let stop = null;
async function record() {
  if (stop) return stop();
  say("");
  let stream;
  // Echo cancellation and the like change a voice.
  try { stream = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false } }); }
  catch (error) { return say(`no microphone: ${error.message}`, true); }
  const context = new AudioContext(), blocks = [];
  await context.audioWorklet.addModule("/recorder.js");
  const recorder = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
  recorder.port.onmessage = ({ data }) => blocks.push(data);
  context.createMediaStreamSource(stream).connect(recorder);
  $("record").textContent = "stop";
  stop = async () => {
    stop = null;
    $("record").textContent = "record";
    stream.getTracks().forEach((track) => track.stop());
    await context.close();
    const number = 1 + recordings.filter((one) => one.name.startsWith("recording ")).length;
    await add([new File([wav(blocks, context.sampleRate)], `recording ${number}.wav`)]);
  };
}

// 16-bit PCM WAV of blocks of floats.
function wav(blocks, rate) {
  const samples = blocks.reduce((sum, block) => sum + block.length, 0), view = new DataView(new ArrayBuffer(44 + 2 * samples));
  const text = (at, word) => [...word].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * samples, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * samples, true);
  let at = 44;
  for (const block of blocks) for (const value of block) { view.setInt16(at, Math.max(-32768, Math.min(32767, Math.round(32768 * value))), true); at += 2; }
  return view.buffer;
}

const drop = $("drop");
drop.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
drop.ondragleave = () => drop.classList.remove("over");
drop.ondrop = (event) => { event.preventDefault(); drop.classList.remove("over"); add([...event.dataTransfer.files]); };
$("files").onchange = async (event) => { const files = [...event.target.files]; event.target.value = ""; await add(files); };
$("record").onclick = record;
$("clear").onclick = () => { recordings = []; say(""); show(); };
ask("/about").then((found) => {
  about = found;
  $("network").textContent = about.network;
  if (about.uncalibrated) say(about.uncalibrated, true);
});
