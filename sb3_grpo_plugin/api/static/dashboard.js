// The page at /dashboard. Every text of a person or the server reaches the page as textContent, never as markup.

// Row: name: [English, Japanese]. {word} is filled in.
export const TEXT = {
  page_title: ["Training dashboard", "学習ダッシュボード"],
  sections: ["Sections", "セクション"],
  skip_to_jobs: ["Skip to jobs", "ジョブ一覧へ移動"],
  nav_start: ["Start", "開始"],
  nav_try: ["Try", "試す"],
  api_docs: ["API", "API"],
  language: ["日本語", "English"],
  log_out: ["Log out", "ログアウト"],
  log_in: ["Log in", "ログイン"],
  log_in_help: ["This server asks for its API key. The browser keeps a session cookie, not the key.",
    "このサーバーには API キーが必要です。ブラウザに残るのはセッション Cookie で、キーは保存しません。"],
  api_key: ["API key", "API キー"],
  key_wrong: ["This is not the server's key.", "キーが違います。"],
  session_over: ["The session is over. Please log in again.", "セッションが切れました。もう一度ログインしてください。"],
  connected: ["{running} running, {queued} queued", "学習中 {running}、待機 {queued}"],
  database_down: ["The database does not answer", "データベースが応答しません"],
  disconnected: ["No answer from the server. Trying again.", "サーバーから応答がありません。再接続しています。"],
  start_title: ["Start a training", "学習を始める"],
  environment: ["Environment", "環境"],
  reward: ["Reward", "報酬"],
  own_reward: ["The environment's own", "環境本来の報酬"],
  steps: ["Steps", "ステップ数"],
  model_name: ["Model name", "モデル名"],
  from_yml: ["default", "既定値"],
  chosen_for_you: ["automatic", "自動"],
  start: ["Start", "開始"],
  advanced: ["Hyperparameters", "ハイパーパラメータ"],
  advanced_help: ["Empty fields take what grpo.yml says for the environment.", "空欄には、grpo.yml にある環境ごとの値を使います。"],
  learning_rate: ["Learning rate", "学習率"],
  n_steps: ["Steps per rollout", "ロールアウト長"],
  batch_size: ["Batch size", "バッチサイズ"],
  n_epochs: ["Epochs", "エポック数"],
  env_missing: ["Name an environment, for example CartPole-v1.", "環境を入力してください (例: CartPole-v1)。"],
  number_wrong: ["This is not a number that fits here.", "ここに入れられる数値ではありません。"],
  started: ["{model} waits for its turn.", "{model} を待ち行列に加えました。"],
  jobs: ["Jobs", "ジョブ"],
  no_jobs: ["No training yet. Start one above.", "まだ学習はありません。上のフォームから始められます。"],
  show_more: ["Show more", "さらに表示"],
  queued: ["queued", "待機中"],
  running: ["running", "学習中"],
  stopping: ["stopping", "停止処理中"],
  completed: ["completed", "完了"],
  stopped: ["stopped", "停止"],
  failed: ["failed", "失敗"],
  interrupted: ["interrupted", "中断"],
  job_is: ["{model}: {status}", "{model}: {status}"],
  stop: ["Stop", "停止"],
  stop_label: ["Stop {model}", "{model} を停止"],
  stop_sent: ["{model} stops at the end of its rollout and keeps its model.", "{model} は今のロールアウトが終わると止まります。モデルは残ります。"],
  progress: ["Progress of {model}", "{model} の進捗"],
  progress_text: ["{done} of {total} steps", "{total} ステップ中 {done}"],
  percent: ["{n} %", "{n}%"],
  time_left: ["{time}, about {left} left", "経過 {time}、残り約 {left}"],
  time_spent: ["took {time}", "所要時間 {time}"],
  seconds: ["{s} s", "{s}秒"],
  minutes: ["{m} min {s} s", "{m}分{s}秒"],
  hours: ["{h} h {m} min", "{h}時間{m}分"],
  episode_reward: ["Episode reward", "エピソード報酬"],
  episode_length: ["Episode length", "エピソード長"],
  fps: ["Steps per second", "毎秒ステップ数"],
  frac_reward_zero_std: ["Groups without a difference", "差のないグループ"],
  chart_empty: ["No finished episode yet", "終わったエピソードはまだありません"],
  chart_label: ["{what}: from {first} to {last} in {steps} steps", "{what}: {steps} ステップで {first} から {last}"],
  at_step: ["{value} at step {step}", "ステップ {step} で {value}"],
  details: ["Details", "詳細"],
  job_id: ["Job", "ジョブ ID"],
  started_at: ["Started", "開始"],
  ended_at: ["Ended", "終了"],
  models: ["Models", "モデル"],
  no_models: ["No model yet. A training that ended or was stopped leaves one here.",
    "まだモデルはありません。学習が終わるか停止すると、ここに残ります。"],
  model_steps: ["{n} steps", "{n} ステップ"],
  mean_reward: ["mean reward {n}", "平均報酬 {n}"],
  megabytes: ["{n} MB", "{n} MB"],
  kilobytes: ["{n} kB", "{n} kB"],
  try_it: ["Try", "試す"],
  try_label: ["Try {model}", "{model} を試す"],
  download: ["Download", "ダウンロード"],
  download_label: ["Download {model}", "{model} をダウンロード"],
  delete: ["Delete", "削除"],
  delete_label: ["Delete {model}", "{model} を削除"],
  delete_question: ["Delete {model}? Its file cannot be brought back.", "{model} を削除しますか? ファイルは元に戻せません。"],
  deleted: ["{model} is deleted.", "{model} を削除しました。"],
  cancel: ["Cancel", "キャンセル"],
  try_title: ["Try a model", "モデルを試す"],
  try_empty: ["Once there is a model, ask it for an action here.", "モデルができると、ここで行動を求められます。"],
  model: ["Model", "モデル"],
  observation: ["Observation (JSON)", "観測 (JSON)"],
  space: ["Expected: {space}", "形式: {space}"],
  deterministic: ["Deterministic", "決定的"],
  predict: ["Get the action", "行動を求める"],
  not_json: ["The observation is not JSON: {why}", "観測が JSON になっていません: {why}"],
  action: ["Action", "行動"],
  probability: ["Probability of action {n}", "行動 {n} の確率"],
  rollout_title: ["Watch an episode", "エピソードを見る"],
  seed: ["Seed", "シード"],
  run_episode: ["Run an episode", "エピソードを実行"],
  rendering: ["The agent plays.", "エージェントが実行中です。"],
  rollout_done: ["{n} steps, return {total}", "{n} ステップ、リターン {total}"],
  frame: ["Frame", "フレーム"],
  frame_text: ["{n} / {total}", "{n} / {total}"],
  frame_label: ["Rendered episode of {model}, frame {n} of {total}", "{model} のエピソード、{total} フレーム中 {n}"],
  play: ["Play", "再生"],
  pause: ["Pause", "一時停止"],
  refused: ["{why}", "サーバーの応答: {why}"],
  no_answer: ["The server did not answer.", "サーバーから応答がありません。"],
  too_many: ["Too many requests; try again in {n} s.", "リクエストが多すぎます。{n} 秒後にもう一度お試しください。"],
};

const LANGUAGES = ["en", "ja"];
const ACTIVE = new Set(["queued", "running", "stopping"]);
const NUMBERS = ["episode_reward", "episode_length", "fps", "frac_reward_zero_std"];
const CURVES = ["episode_reward", "fps", "frac_reward_zero_std"];
// A browser opens six connections to a host for all its tabs: a page must not hold many streams
const MAX_STREAMS = 2;
const MAX_POINTS = 500;
const PAGE = 10;

const state = {
  language: "en", locked: true, health: null, online: true, jobs: [], total: 0, limit: PAGE, models: [], environments: [], rewards: [],
  cards: new Map(), streams: new Map(), rows: new Map(), timer: 0, modelsRead: 0,
};

const $ = (id) => document.getElementById(id);

// ---- texts -----------------------------------------------------------------------------------------------------------------

function t(name, values = {}) {
  return TEXT[name][LANGUAGES.indexOf(state.language)].replace(/\{(\w+)\}/g, (_, word) => String(values[word]));
}

function number(value, digits = 0) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return new Intl.NumberFormat(state.language, { maximumFractionDigits: digits }).format(value);
}

// Three significant digits or whole numbers: 0.0123, 1.23, 195.3, 12,288
function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return number(value);
  if (size >= 100) return number(value, 1);
  return new Intl.NumberFormat(state.language, { maximumSignificantDigits: 3 }).format(value);
}

// The value of a metric: shares are read as percentages
function shown(name, value) {
  return name === "frac_reward_zero_std" && Number.isFinite(value) ? t("percent", { n: number(100 * value, 1) }) : short(value);
}

function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return t("seconds", { s });
  if (s < 3600) return t("minutes", { m: Math.floor(s / 60), s: s % 60 });
  return t("hours", { h: Math.floor(s / 3600), m: Math.floor((s % 3600) / 60) });
}

function moment(text) {
  const time = text === null || text === undefined ? NaN : Date.parse(text);
  if (Number.isNaN(time)) return "–";
  return new Intl.DateTimeFormat(state.language, { dateStyle: "medium", timeStyle: "short" }).format(time);
}

function size(bytes) {
  return bytes >= 1e6 ? t("megabytes", { n: number(bytes / 1e6, 1) }) : t("kilobytes", { n: number(bytes / 1e3) });
}

function translate(root) {
  for (const element of root.querySelectorAll("*")) {
    for (const attribute of element.getAttributeNames()) {
      if (attribute === "data-text") element.textContent = t(element.dataset.text);
      else if (attribute.startsWith("data-text-")) {
        element.setAttribute(attribute.slice("data-text-".length), t(element.getAttribute(attribute)));
      }
    }
  }
}

function setLanguage(language) {
  state.language = language;
  document.documentElement.lang = language;
  document.title = `${t("page_title")} · sb3-grpo`;
  translate(document);
  $("language").textContent = t("language");
  $("language").lang = language === "en" ? "ja" : "en";
  for (const message of document.querySelectorAll(".message")) say(message, "");
  showConnection();
  showRewards();
  showJobs();
  showModels();
  showFrame();
}

// ---- elements --------------------------------------------------------------------------------------------------------------

// make("p", {class: "hint"}, "text", child): attributes are set as attributes, texts as text
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

// Screen readers speak a status again only when its text changed, and so does a person's eye
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function say(element, text, bad = false) {
  element.classList.toggle("bad", bad);
  setText(element, text);
}

function announce(text) {
  setText($("announce"), text);
}

// ---- the server ------------------------------------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(status, detail, wait) {
    const fields = Array.isArray(detail) ? detail : [];
    super(fields.length ? fields.map((item) => `${(item.loc ?? []).slice(1).join(".")}: ${item.msg}`).join("; ") : String(detail));
    this.status = status;
    this.fields = fields;
    this.wait = wait;
  }

  get text() {
    if (this.status === 0) return t("no_answer");
    if (this.status === 429) return t("too_many", { n: this.wait });
    return t("refused", { why: this.message });
  }
}

// Relative, so that the page works behind a proxy's path too
async function call(path, { method = "GET", body } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method,
      credentials: "same-origin",
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    throw new Refusal(0, error.message, 0);
  }
  const text = await response.text();
  let answer = null;
  try {
    answer = text ? JSON.parse(text) : null;
  } catch {
    answer = { detail: response.statusText };
  }
  if (!response.ok) {
    throw new Refusal(response.status, answer?.detail ?? response.statusText, Number(response.headers.get("Retry-After")) || 5);
  }
  return answer;
}

const job = (id, rest) => `training/${encodeURIComponent(id)}/${rest}`;
const model = (name, rest = "") => `models/${encodeURIComponent(name)}${rest}`;

function report(element, error) {
  if (!(error instanceof Refusal)) throw error;
  if (error.status === 401) lock("session_over");
  else say(element, error.text, true);
}

// ---- curves ----------------------------------------------------------------------------------------------------------------

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const values = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) values.push(k * step || 0);
  return values;
}

class Chart {
  constructor(name) {
    this.name = name;
    this.reading = make("span", { class: "number muted" });
    this.svg = draw("svg", { role: "img" });
    this.element = make("figure", { class: "chart" },
      make("figcaption", {}, make("span", { "data-text": name }), this.reading), this.svg);
    this.points = [];
    new ResizeObserver(() => this.show()).observe(this.element);
    this.svg.addEventListener("pointermove", (event) => this.read(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.read(null));
  }

  // points: [[timestep, value or null], ...]
  set(points, total) {
    this.points = points.filter(([, value]) => value !== null && value !== undefined);
    this.total = total;
    this.show();
  }

  show() {
    const width = Math.floor(this.svg.clientWidth);
    const height = Math.floor(this.svg.clientHeight);
    if (width < 60 || height < 40) return;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.marker = null;
    if (!this.points.length) {
      this.svg.setAttribute("aria-label", `${t(this.name)}: ${t("chart_empty")}`);
      this.svg.append(draw("text", { class: "none", x: width / 2, y: height / 2 }, t("chart_empty")));
      return;
    }
    const values = this.points.map(([, value]) => value);
    let low = Math.min(...values);
    let high = Math.max(...values);
    const margin = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
    // Rates and shares do not go below zero, so their axis does not either
    low = low >= 0 ? Math.max(0, low - margin) : low - margin;
    high += margin;
    const end = Math.max(this.total || 0, this.points.at(-1)[0], 1);
    const left = 46, right = 12, top = 6, bottom = 18;
    this.x = (step) => left + (step / end) * (width - left - right);
    this.y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
    for (const value of ticks(low, high, height > 90 ? 4 : 3)) {
      const y = this.y(value).toFixed(1);
      this.svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }),
        draw("text", { class: "y", x: left - 6, y }, shown(this.name, value)));
    }
    for (const step of ticks(0, end, width > 360 ? 4 : 2)) {
      const edge = this.x(step) > width - right - 24;
      this.svg.append(draw("text", { class: edge ? "x last" : "x", x: edge ? width - 2 : this.x(step).toFixed(1), y: height - 4 },
        number(step)));
    }
    const path = this.points.map(([step, value], k) => `${k ? "L" : "M"}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`);
    this.svg.append(draw("path", { class: "line", d: path.join("") }));
    const [step, value] = this.points.at(-1);
    this.marker = draw("circle", { class: "dot", r: 3, cx: this.x(step).toFixed(1), cy: this.y(value).toFixed(1) });
    this.svg.append(this.marker);
    this.svg.setAttribute("aria-label",
      t("chart_label", { what: t(this.name), first: shown(this.name, values[0]), last: shown(this.name, value), steps: number(step) }));
    this.read(null);
  }

  // The value under the pointer, the last one otherwise
  read(x) {
    if (!this.marker) return;
    let nearest = this.points.at(-1);
    if (x !== null) {
      for (const point of this.points) if (Math.abs(this.x(point[0]) - x) < Math.abs(this.x(nearest[0]) - x)) nearest = point;
    }
    this.marker.setAttribute("cx", this.x(nearest[0]).toFixed(1));
    this.marker.setAttribute("cy", this.y(nearest[1]).toFixed(1));
    setText(this.reading, t("at_step", { value: shown(this.name, nearest[1]), step: number(nearest[0]) }));
  }
}

// ---- jobs ------------------------------------------------------------------------------------------------------------------

class Card {
  constructor(id) {
    this.id = id;
    this.curve = new Map();
    this.charts = Object.fromEntries(CURVES.map((name) => [name, new Chart(name)]));
    this.title = make("h3");
    this.badge = make("span", { class: "badge" });
    this.about = make("span", { class: "muted about" });
    this.stop = make("button", { type: "button", class: "quiet stop", "data-text": "stop" });
    this.bar = make("progress", { max: "1" });
    this.steps = make("p", { class: "number steps" });
    this.time = make("p", { class: "muted time" });
    this.values = Object.fromEntries(NUMBERS.map((name) => [name, make("dd", { class: "number" })]));
    this.error = make("p", { class: "error" });
    this.facts = make("dl", { class: "facts" });
    this.more = make("details", {}, make("summary", { "data-text": "details" }),
      make("div", { class: "charts" }, this.charts.fps.element, this.charts.frac_reward_zero_std.element), this.facts);
    const numbers = make("dl", { class: "numbers" });
    for (const name of NUMBERS) numbers.append(make("div", {}, make("dt", { "data-text": name }), this.values[name]));
    this.element = make("li", { class: "job", tabindex: "-1" },
      make("div", { class: "job-head" }, make("div", { class: "job-name" }, this.title, this.badge, this.about), this.stop),
      make("div", { class: "job-body" },
        make("div", { class: "job-side" }, this.bar, this.steps, this.time, numbers), this.charts.episode_reward.element),
      this.error, this.more);
    this.element.dataset.job = id;
    this.stop.addEventListener("click", () => stopJob(this));
    this.heard = 0;
  }

  get name() {
    return this.job.model_name || this.id;
  }

  update(record) {
    const before = this.job?.status;
    this.job = record;
    if (before && before !== record.status) {
      announce(t("job_is", { model: this.name, status: t(record.status) }));
      if (!ACTIVE.has(record.status)) {
        this.readCurve();
        readModels();
      }
    }
    this.show();
  }

  show() {
    const record = this.job;
    translate(this.element);
    this.element.dataset.status = record.status;
    setText(this.title, this.name);
    setText(this.badge, t(record.status));
    setText(this.about, [record.env_name, record.reward_function_type].filter(Boolean).join(" · "));
    const stoppable = record.status === "queued" || record.status === "running";
    // What disappears must not take the focus with it
    if (!stoppable && document.activeElement === this.stop) this.element.focus();
    this.stop.hidden = !stoppable;
    this.stop.setAttribute("aria-label", t("stop_label", { model: this.name }));
    const done = record.current_timesteps ?? 0;
    const share = record.total_timesteps ? Math.min(1, done / record.total_timesteps) : 0;
    this.bar.value = share;
    this.bar.setAttribute("aria-label", t("progress", { model: this.name }));
    this.steps.replaceChildren(
      make("span", {}, t("progress_text", { done: number(done), total: number(record.total_timesteps) })),
      make("span", { class: "share" }, t("percent", { n: number(Math.floor(share * 100)) })));
    setText(this.time, this.timeText(done));
    for (const name of NUMBERS) setText(this.values[name], shown(name, record.metrics?.[name]));
    setText(this.error, record.error_message ?? "");
    this.error.hidden = !record.error_message;
    this.showFacts();
    this.showCurve();
    // A job that waits, or failed at once, has nothing to draw
    this.element.classList.toggle("bare", !this.curve.size && !Object.keys(record.metrics ?? {}).length);
  }

  timeText(done) {
    const { start_time: start, end_time: end, total_timesteps: total, metrics } = this.job;
    if (!start) return "";
    const spent = (Date.parse(end ?? new Date().toISOString()) - Date.parse(start)) / 1000;
    if (end) return t("time_spent", { time: duration(spent) });
    const rate = metrics?.fps;
    return rate > 0 ? t("time_left", { time: duration(spent), left: duration((total - done) / rate) }) : duration(spent);
  }

  showFacts() {
    const { start_time: start, end_time: end, metrics } = this.job;
    const facts = [[t("job_id"), this.id], [t("started_at"), moment(start)], [t("ended_at"), moment(end)]];
    for (const [name, value] of Object.entries(metrics ?? {})) if (!NUMBERS.includes(name)) facts.push([name, short(value)]);
    this.facts.replaceChildren(...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  }

  add(point) {
    this.curve.set(point.timesteps, point);
    if (this.curve.size > 2 * MAX_POINTS) this.curve = new Map([...this.curve].filter((_, k) => k % 2 === 0));
    this.showCurve();
  }

  showCurve() {
    const points = [...this.curve.values()].sort((a, b) => a.timesteps - b.timesteps);
    for (const name of CURVES) {
      this.charts[name].set(points.map((point) => [point.timesteps, point[name]]), this.job.total_timesteps);
    }
  }

  async readCurve() {
    try {
      const curve = await call(job(this.id, "curve"));
      const points = curve.timesteps.map((timesteps, k) => {
        const point = { timesteps };
        for (const name of CURVES) point[name] = curve[name][k];
        return [timesteps, point];
      });
      this.curve = new Map(points);
      this.showCurve();
    } catch (error) {
      // The poll tells the person; the next one reads the curve again
      if (!(error instanceof Refusal)) throw error;
    }
  }
}

function showJobs() {
  const list = $("job-list");
  const ids = new Set(state.jobs.map((record) => record.job_id));
  for (const [id, card] of state.cards) {
    if (ids.has(id)) continue;
    card.element.remove();
    closeStream(id);
    state.cards.delete(id);
  }
  let place = list.firstElementChild;
  for (const record of state.jobs) {
    let card = state.cards.get(record.job_id);
    if (!card) {
      card = new Card(record.job_id);
      state.cards.set(record.job_id, card);
    }
    // Only what is out of place moves: moving takes the focus away
    if (card.element !== place) list.insertBefore(card.element, place);
    else place = place.nextElementSibling;
    // What a stream said is newer than a list that was asked for before
    if (card.job && hears(card)) card.show();
    else card.update(record);
  }
  $("jobs-empty").hidden = state.jobs.length > 0;
  $("jobs-more").hidden = state.jobs.length >= state.total;
  setText($("jobs-count"), state.total ? number(state.total) : "");
}

async function stopJob(card) {
  const message = $("jobs").querySelector(".message");
  try {
    const answer = await call(job(card.id, "stop"), { method: "POST" });
    card.update({ ...card.job, status: answer.status });
    // A job that only waited is stopped at once
    say(message, answer.status === "stopping" ? t("stop_sent", { model: card.name }) : "");
  } catch (error) {
    report(message, error);
  }
}

function openStream(card) {
  const source = new EventSource(job(card.id, "events"));
  state.streams.set(card.id, source);
  const on = (name, act) => source.addEventListener(name, (event) => {
    card.heard = Date.now();
    act(event.data ? JSON.parse(event.data) : null);
  });
  on("status", (record) => card.update(record));
  on("point", (point) => card.add(point));
  on("end", () => {
    closeStream(card.id);
    poll();
  });
  // The browser would try again by itself and for ever; the poll looks first whether there is something to hear
  source.addEventListener("error", () => closeStream(card.id));
}

function closeStream(id) {
  state.streams.get(id)?.close();
  state.streams.delete(id);
}

// Whether a stream tells of the job: some proxies hold streams back until they end
function hears(card) {
  return state.streams.has(card.id) && Date.now() - card.heard < 3000;
}

function openStreams() {
  for (const record of state.jobs) {
    const card = state.cards.get(record.job_id);
    if (ACTIVE.has(card.job.status) && !state.streams.has(card.id) && state.streams.size < MAX_STREAMS) openStream(card);
  }
}

async function readCurves() {
  for (const card of [...state.cards.values()]) {
    const unread = !card.curve.size && !card.asked;
    const live = ACTIVE.has(card.job.status) && !hears(card);
    if (card.job.status === "queued" || !(unread || live)) continue;
    card.asked = true;
    await card.readCurve();
  }
}

// ---- models ----------------------------------------------------------------------------------------------------------------

class ModelRow {
  constructor(name) {
    this.name = name;
    this.about = make("p", { class: "muted" });
    this.made = make("p", { class: "muted" });
    this.tryIt = make("button", { type: "button", class: "quiet", "data-text": "try_it" });
    this.download = make("a", { class: "button quiet", href: model(name, "/download"), download: "", "data-text": "download" });
    this.remove = make("button", { type: "button", class: "quiet", "data-text": "delete" });
    this.element = make("li", { class: "model" },
      make("div", { class: "model-text" }, make("h3", {}, name), this.about, this.made),
      make("div", { class: "model-tools" }, this.tryIt, this.download, this.remove));
    this.element.dataset.model = name;
    this.tryIt.addEventListener("click", () => {
      $("try-form").elements.model_name.value = name;
      chooseModel();
      $("try").scrollIntoView({ block: "nearest" });
      $("try-form").elements.observation.focus();
    });
    this.remove.addEventListener("click", () => deleteModel(name));
  }

  show(record) {
    translate(this.element);
    const about = [record.env_name, record.reward, t("model_steps", { n: number(record.total_timesteps) })];
    if (Number.isFinite(record.mean_reward)) about.push(t("mean_reward", { n: short(record.mean_reward) }));
    setText(this.about, about.filter(Boolean).join(" · "));
    setText(this.made, [moment(record.created), size(record.size)].join(" · "));
    this.tryIt.setAttribute("aria-label", t("try_label", { model: this.name }));
    this.download.setAttribute("aria-label", t("download_label", { model: this.name }));
    this.remove.setAttribute("aria-label", t("delete_label", { model: this.name }));
  }
}

async function readModels() {
  state.modelsRead = Date.now();
  try {
    state.models = (await call("models")).models;
    showModels();
  } catch (error) {
    report($("models").querySelector(".message"), error);
  }
}

function showModels() {
  const list = $("model-list");
  const names = state.models.map((record) => record.name);
  for (const [name, row] of state.rows) {
    if (names.includes(name)) continue;
    row.element.remove();
    state.rows.delete(name);
  }
  for (const record of state.models) {
    let row = state.rows.get(record.name);
    if (!row) {
      row = new ModelRow(record.name);
      state.rows.set(record.name, row);
    }
    row.show(record);
  }
  const wanted = names.map((name) => state.rows.get(name).element);
  if (wanted.some((element, k) => list.children[k] !== element)) list.replaceChildren(...wanted);
  $("models-empty").hidden = names.length > 0;
  setText($("models-count"), names.length ? number(names.length) : "");

  const select = $("try-form").elements.model_name;
  const chosen = select.value;
  if ([...select.options].map((option) => option.value).join("\n") !== names.join("\n")) {
    select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
    if (names.includes(chosen)) select.value = chosen;
  }
  $("try-form").hidden = !names.length;
  $("try-empty").hidden = names.length > 0;
  if (select.value !== chosen || !names.length) chooseModel();
  showSpace();
}

async function deleteModel(name) {
  setText($("confirm-text"), t("delete_question", { model: name }));
  setText($("confirm-yes"), t("delete"));
  const dialog = $("confirm");
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((resolve) => { dialog.addEventListener("close", resolve, { once: true }); });
  if (dialog.returnValue !== "yes") return;
  const message = $("models").querySelector(".message");
  try {
    await call(model(name), { method: "DELETE" });
    say(message, t("deleted", { model: name }));
    $("models").focus();
    await readModels();
  } catch (error) {
    report(message, error);
  }
}

// ---- trying a model --------------------------------------------------------------------------------------------------------

const chosenModel = () => state.models.find((record) => record.name === $("try-form").elements.model_name.value);

// An observation of zeros, or what is nearest to zero inside the bounds
function example(space) {
  const flat = Array.isArray(space?.low) || Array.isArray(space?.high);
  const bound = (limit, index) => (Array.isArray(limit) ? limit[index] : limit);
  let index = 0;
  const fill = (shape, low, high) => {
    if (shape.length) return Array.from({ length: shape[0] }, () => fill(shape.slice(1), low, high));
    const value = Math.min(Math.max(0, bound(low, index) ?? 0), bound(high, index) ?? Infinity);
    // Bounds of their own for each element come in one list, in the order of the elements
    if (flat) index += 1;
    return value;
  };
  switch (space?.type) {
    case "Box": return fill(space.shape, space.low, space.high);
    case "Discrete": return space.start;
    case "MultiDiscrete":
    case "MultiBinary": return fill(space.shape, 0, null);
    case "Dict": return Object.fromEntries(Object.entries(space.spaces).map(([name, part]) => [name, example(part)]));
    default: return null;
  }
}

function spaceText(space) {
  switch (space?.type) {
    case "Box": return `Box ${JSON.stringify(space.shape)} ${space.dtype ?? ""}`.trim();
    case "Discrete": return `Discrete ${space.n}`;
    case "MultiDiscrete": return `MultiDiscrete ${JSON.stringify(space.nvec)}`;
    case "MultiBinary": return `MultiBinary ${JSON.stringify(space.shape)}`;
    case "Dict": return `{${Object.entries(space.spaces).map(([name, part]) => `${name}: ${spaceText(part)}`).join(", ")}}`;
    default: return "–";
  }
}

function showSpace() {
  const record = chosenModel();
  setText($("observation-space"), record ? t("space", { space: spaceText(record.observation_space) }) : "");
  $("rollout-form").hidden = !record || !state.environments.some((env) => env.id === record.env_name && env.renderable);
}

function chooseModel() {
  const record = chosenModel();
  $("try-form").elements.observation.value = record ? JSON.stringify(example(record.observation_space)) : "";
  $("answer").hidden = true;
  stopPlaying();
  player.frames = [];
  $("player").hidden = true;
  for (const message of $("try").querySelectorAll(".message")) say(message, "");
  showSpace();
}

async function predict(form) {
  const message = form.querySelector(".message");
  say(message, "");
  let observation;
  try {
    observation = JSON.parse(form.elements.observation.value);
  } catch (error) {
    $("answer").hidden = true;
    return say(message, t("not_json", { why: error.message }), true);
  }
  try {
    const body = { model_name: form.elements.model_name.value, observation, deterministic: form.elements.deterministic.checked };
    const answer = await call("inference", { method: "POST", body });
    const parts = [make("p", { class: "number" }, `${t("action")}: `, make("strong", {}, JSON.stringify(answer.action)))];
    const probabilities = answer.action_probs;
    if (Array.isArray(probabilities) && probabilities.length <= 32 && probabilities.every(Number.isFinite)) {
      parts.push(make("ul", { class: "chances" }, ...probabilities.map((chance, k) => {
        const label = t("probability", { n: k });
        return make("li", {}, make("span", { class: "number" }, String(k)),
          make("meter", { min: "0", max: "1", value: String(chance), "aria-label": label, title: label }),
          make("span", { class: "number" }, number(chance, 3)));
      })));
    } else if (probabilities) parts.push(make("p", { class: "number muted" }, JSON.stringify(probabilities).slice(0, 500)));
    $("answer").replaceChildren(...parts);
    $("answer").hidden = false;
  } catch (error) {
    $("answer").hidden = true;
    report(message, error);
  }
}

const player = { frames: [], at: 0, timer: 0, fps: 30, model: "" };

async function rollout(form) {
  const message = form.querySelector(".message");
  const name = $("try-form").elements.model_name.value;
  stopPlaying();
  say(message, t("rendering"));
  try {
    const seed = encodeURIComponent(form.elements.seed.value || "0");
    const answer = await call(model(name, `/rollout?seed=${seed}&max_steps=500`));
    // Decoded here and drawn: no image is loaded from an address
    const frames = await Promise.all(answer.frames.map((frame) => {
      const bytes = Uint8Array.from(atob(frame.slice(frame.indexOf(",") + 1)), (letter) => letter.charCodeAt(0));
      return createImageBitmap(new Blob([bytes], { type: bytes[0] === 0x89 ? "image/png" : "image/jpeg" }));
    }));
    if ($("try-form").elements.model_name.value !== name) return;
    for (const frame of player.frames) frame.close();
    Object.assign(player, { frames, at: 0, fps: answer.fps || 30, model: name });
    $("position").max = String(frames.length - 1);
    $("player").hidden = false;
    say(message, t("rollout_done", { n: number(answer.rewards.length), total: short(answer.return) }));
    showFrame();
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play();
  } catch (error) {
    report(message, error);
  }
}

function showFrame() {
  setText($("play"), t(player.timer ? "pause" : "play"));
  const frame = player.frames[player.at];
  if (!frame) return;
  const canvas = $("frame");
  if (canvas.width !== frame.width || canvas.height !== frame.height) {
    canvas.width = frame.width;
    canvas.height = frame.height;
  }
  canvas.getContext("2d").drawImage(frame, 0, 0);
  const total = number(player.frames.length);
  $("position").value = String(player.at);
  setText($("frame-text"), t("frame_text", { n: number(player.at + 1), total }));
  canvas.setAttribute("aria-label", t("frame_label", { model: player.model, n: number(player.at + 1), total }));
}

function play() {
  if (player.at >= player.frames.length - 1) player.at = 0;
  player.timer = setInterval(() => {
    player.at += 1;
    if (player.at >= player.frames.length - 1) stopPlaying();
    showFrame();
  }, 1000 / player.fps);
  showFrame();
}

function stopPlaying() {
  clearInterval(player.timer);
  player.timer = 0;
  showFrame();
}

// ---- the start form --------------------------------------------------------------------------------------------------------

// Python's fnmatch: * and ? and nothing else that an environment ID could hold
function matches(pattern, id) {
  const escaped = pattern.replace(/[.+^${}()|[\]\\]/g, "\\$&");
  return new RegExp(`^${escaped.replaceAll("*", ".*").replaceAll("?", ".")}$`).test(id);
}

function showRewards() {
  const select = $("start-form").elements.reward_function_type;
  const id = $("start-form").elements.env_name.value.trim();
  const chosen = select.value;
  const known = state.environments.some((env) => env.id === id);
  const fitting = state.rewards.filter((reward) => !known || reward.envs.some((pattern) => matches(pattern, id)));
  select.replaceChildren(make("option", { value: "" }, t("own_reward")),
    ...fitting.map((reward) => make("option", { value: reward.name, title: reward.description ?? "" }, reward.name)));
  if (fitting.some((reward) => reward.name === chosen)) select.value = chosen;
}

function markField(input, text) {
  input.closest(".field").querySelector(".field-error")?.remove();
  input.toggleAttribute("aria-invalid", Boolean(text));
  input.removeAttribute("aria-describedby");
  if (!text) return;
  input.setAttribute("aria-invalid", "true");
  const note = make("span", { class: "field-error", id: `${input.name}-error` }, text);
  input.setAttribute("aria-describedby", note.id);
  input.closest(".field").append(note);
}

async function start(form) {
  const message = form.querySelector(".message");
  const inputs = [...form.elements].filter((input) => input.name);
  const body = {};
  const wrong = [];
  say(message, "");
  for (const input of inputs) {
    const text = input.value.trim();
    markField(input, "");
    if (input.name === "env_name" && !text) wrong.push([input, t("env_missing")]);
    else if (input.type === "number" && !input.validity.valid) wrong.push([input, t("number_wrong")]);
    else if (text) body[input.name] = input.type === "number" ? Number(text) : text;
  }
  if (wrong.length) return showWrong(wrong);
  try {
    const answer = await call("train", { method: "POST", body });
    say(message, t("started", { model: body.model_name ?? answer.job_id }));
    form.elements.model_name.value = "";
    await poll();
  } catch (error) {
    const named = (error.fields ?? []).map((item) => [inputs.find((input) => input.name === item.loc?.at(-1)), item.msg]);
    if (named.length && named.every(([input]) => input)) showWrong(named);
    else report(message, error);
  }
}

function showWrong(pairs) {
  for (const [input, text] of pairs) markField(input, text);
  if ($("advanced").contains(pairs[0][0])) $("advanced").open = true;
  pairs[0][0].focus();
}

// ---- session and polling ---------------------------------------------------------------------------------------------------

function showConnection() {
  const element = $("connection");
  const down = state.online && state.health?.database === "down";
  element.classList.toggle("bad", !state.online || down);
  if (!state.online) setText(element, t("disconnected"));
  else if (down) setText(element, t("database_down"));
  else if (state.health) setText(element, t("connected", state.health.queue));
}

function showApp(open) {
  for (const id of ["app", "sections", "skip"]) $(id).hidden = !open;
  $("login").hidden = open;
}

function lock(reason = "") {
  state.locked = true;
  clearTimeout(state.timer);
  for (const id of [...state.streams.keys()]) closeStream(id);
  stopPlaying();
  showApp(false);
  $("logout").hidden = true;
  say($("login").querySelector(".message"), reason ? t(reason) : "", Boolean(reason));
  $("login-form").elements.api_key.focus();
}

async function enter(session) {
  state.locked = false;
  showApp(true);
  $("logout").hidden = !session.key_required;
  const [environments, rewards] = await Promise.all([call("environments"), call("rewards")]);
  state.environments = environments.environments;
  state.rewards = rewards.rewards;
  $("environments").replaceChildren(...state.environments.map((env) => make("option", { value: env.id })));
  showRewards();
  await Promise.all([readModels(), poll()]);
}

async function logIn(form) {
  const message = form.querySelector(".message");
  try {
    await call("login", { method: "POST", body: { api_key: form.elements.api_key.value } });
    form.reset();
    say(message, "");
    await begin();
    $("start-form").elements.env_name.focus();
  } catch (error) {
    if (error.status === 401) say(message, t("key_wrong"), true);
    else report(message, error);
    form.elements.api_key.select();
  }
}

async function poll() {
  clearTimeout(state.timer);
  if (state.locked || document.hidden) return;
  let delay = 5000;
  try {
    state.health = await call("health");
    state.online = true;
    setText($("version"), state.health.version);
    showConnection();
    const page = await call(`training/jobs?limit=${state.limit}`);
    if (state.locked) return;
    Object.assign(state, page);
    showJobs();
    openStreams();
    await readCurves();
    if (Date.now() - state.modelsRead > 15000) await readModels();
    if ([...state.cards.values()].some((card) => ACTIVE.has(card.job.status) && !hears(card))) delay = 2000;
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 401) return lock("session_over");
    // Those two come from the server itself: it answers
    state.online = error.status === 429 || error.status === 503;
    if (error.status === 429) delay = error.wait * 1000;
    showConnection();
  }
  // Two polls may have run at once (one asked for by a click): one goes on
  clearTimeout(state.timer);
  state.timer = setTimeout(poll, delay);
}

async function begin() {
  try {
    const session = await call("session");
    if (session.key_required && !session.authenticated) lock();
    else await enter(session);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 401) return lock();
    state.online = false;
    showConnection();
    setTimeout(begin, 5000);
  }
}

// One request at a time; a disabled button would lose the focus
function onSubmit(form, act) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (form.ariaBusy === "true") return;
    form.ariaBusy = "true";
    await act(form).finally(() => { form.ariaBusy = "false"; });
  });
}

onSubmit($("start-form"), start);
onSubmit($("login-form"), logIn);
onSubmit($("try-form"), predict);
onSubmit($("rollout-form"), rollout);
$("start-form").elements.env_name.addEventListener("input", showRewards);
$("try-form").elements.model_name.addEventListener("change", chooseModel);
$("play").addEventListener("click", () => (player.timer ? stopPlaying() : play()));
$("position").addEventListener("input", () => {
  player.at = Number($("position").value);
  stopPlaying();
});
$("jobs-more").addEventListener("click", () => {
  state.limit += PAGE;
  poll();
});
$("language").addEventListener("click", () => {
  const language = state.language === "en" ? "ja" : "en";
  localStorage.setItem("sb3-grpo-language", language);
  setLanguage(language);
});
$("logout").addEventListener("click", async () => {
  await call("logout", { method: "POST" }).catch(() => null);
  lock();
});
// A hidden page asks for nothing and holds no connection
document.addEventListener("visibilitychange", () => {
  if (document.hidden) for (const id of [...state.streams.keys()]) closeStream(id);
  else poll();
});

const preferred = localStorage.getItem("sb3-grpo-language") ?? navigator.language;
setLanguage(preferred.startsWith("ja") ? "ja" : "en");
begin();
