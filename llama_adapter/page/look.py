"""What the page looks like: its theme and its styles."""

from __future__ import annotations

import gradio as gr

THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    radius_size="lg",
    # The system's own fonts: others would have to be downloaded.
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(body_text_color_subdued="*neutral_500")

_PAGE = """
.gradio-container { max-width: 60rem !important; width: 100%; margin: auto !important; }
.gradio-container .main { padding: 0.75rem clamp(0.5rem, 3vw, 2rem) !important; }
#header { align-items: center; flex-wrap: nowrap; justify-content: space-between; }
#header h1 { margin: 0; font-size: 1.5rem; white-space: nowrap; }
#title { flex: 1 0 auto; width: auto; }
#expert { flex: 0 1 18rem; min-width: 9rem !important; }
.line, .line * { color: var(--body-text-color-subdued); font-size: var(--text-sm); }
.line p { margin: 0; }
body.dropping .multimodal-textbox { outline: 2px dashed var(--primary-500); outline-offset: -2px; }
"""

_CHAT = """
#chats { align-items: center; flex-wrap: nowrap; gap: 0.5rem; justify-content: space-between; }
#chats > :first-child { max-width: 26rem; }
#chats input { text-overflow: ellipsis; margin-right: 1rem; }
#chat { height: calc(100dvh - 22rem) !important; min-height: 19rem; }
.waiting:not(:has(p)) { display: none; }
.message-row.bubble { margin: 0.75rem 0.75rem 0.5rem; }
.message-buttons .icon-button-wrapper { margin: 0 0.75rem !important; }
.examples { grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) !important; }
/* The note under an answer: no bubble of its own, beside the answer's buttons. */
.bot-row + .message-buttons + .bot-row { margin: -1.45rem 0.75rem 0.5rem 3rem !important; }
.message-buttons:has([aria-label="Retry"]) + .bot-row { margin-left: 6.5rem !important; }
.bot-row + .message-buttons + .bot-row .message {
    padding: 0;
    border: none;
    background: none;
    box-shadow: none;
}
.bot-row + .message-buttons + .bot-row .prose * {
    color: var(--body-text-color-subdued);
    font-size: var(--text-sm);
}
.bot-row + .message-buttons + .bot-row + .message-buttons { display: none; }
/* Pictures above their question, which has the buttons; nothing is shared with huggingface.co. */
.message-row:has(.component) + .message-buttons { display: none; }
/* One picture large, several small and beside each other. */
#chat .message-wrap { display: block; text-align: right; }
#chat .message-wrap > * { width: fit-content; text-align: left; }
#chat .message-wrap > :is(.user-row, .message-buttons-right) { margin-left: auto !important; }
#chat .message-wrap > .message-row:has(.component) {
    display: inline-flex;
    max-width: none;
    margin: 0.5rem 0.75rem 0 0 !important;
}
#chat .message-row .component { padding: 0; border: none; background: none; box-shadow: none; }
#chat .image-frame img {
    width: auto;
    height: auto;
    max-width: 100%;
    max-height: 14rem !important;
    border-radius: var(--radius-lg);
}
#chat .message-row:has(.component):has(+ .message-buttons + .message-row .component) .image-frame img,
#chat .message-row:has(.component) + .message-buttons + .message-row:has(.component) .image-frame img {
    max-height: 6rem !important;
}
.multimodal-textbox .padded-button {
    width: auto !important;
    padding: 0 var(--size-3) !important;
    border-radius: var(--radius-xl);
    background: var(--button-primary-background-fill);
    color: var(--button-primary-text-color);
}
.multimodal-textbox .padded-button:hover { background: var(--button-primary-background-fill-hover); }
/* Gradio at times lays this over a chat whose waiting question was stopped; what went wrong is in a toast. */
[data-testid="status-tracker"]:has(.error) { display: none; }
"""

_OTHER_TABS = """
#question p { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
#question .pictures { display: flex; flex-wrap: wrap; gap: 0.5rem; }
#question img { max-height: 5rem; border-radius: var(--radius-md); }
/* Nothing to clear where every question stands for itself. */
.answer .icon-button-wrapper.top-panel { display: none; }
#gates, #influence { padding: 0; }
.heatmap { overflow-x: auto; }
.heatmap svg { width: 100%; display: block; }
.heatmap text { fill: currentColor; font-size: 11px; }
.heatmap rect { stroke: currentColor; stroke-opacity: 0.15; }
.heatmap rect:hover { stroke-opacity: 1; }
#charts { padding: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.chart svg { width: 100%; display: block; }
.chart text { fill: currentColor; font-size: 11px; }
.chart .axis { stroke: currentColor; fill: none; }
.chart .grid { stroke: currentColor; stroke-opacity: 0.12; fill: none; }
.chart .front { stroke: currentColor; stroke-opacity: 0.6; stroke-dasharray: 4 3; fill: none; }
.chart .curve { stroke-width: 1.5; fill: none; }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; font-size: var(--text-sm); }
.legend i { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 50%; margin-right: 0.4em; }
#compared td { cursor: pointer; }
"""

_PHONE = """
@media (max-width: 640px) {
    #header h1 { font-size: 1.15rem; }
    #title { flex: none; }
    #expert { flex: 1 1 9rem; min-width: 0 !important; }
    #line { display: none; }
    #chat { height: calc(100dvh - 21rem) !important; min-height: 16rem; }
}
"""

CSS = _PAGE + _CHAT + _OTHER_TABS + _PHONE
