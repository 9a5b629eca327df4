"""The page's own JavaScript: cleans the clipboard, accepts dropped pictures anywhere, and saves files."""

from __future__ import annotations

from llama_adapter.page.display import JOINER, NOTE

STORAGE_KEY = "llama-adapter-chats"  # in the browser's localStorage

_CLIPBOARD = f"""
const spoken = text => text
    .replace(/\\n*(assistant: )?{NOTE}.*/g, "")
    .replace(/^user: http\\S+\\/file=\\S+\\/picture\\.png$/gm, "user: (a picture)")
    .replace(/```\\w* {JOINER}\\n([^]*?)\\n```(?=\\n|$)/g, "$1")
    .replaceAll("{JOINER}", "");
document.addEventListener("copy", event => {{
    const selected = String(getSelection());
    if (spoken(selected) !== selected) {{
        event.clipboardData.setData("text/plain", spoken(selected));
        event.preventDefault();
    }}
}});
if (navigator.clipboard) {{
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = text => write(spoken(text));
}}
"""

# A picture may be dropped anywhere on the page: the visible box gets it. Without this the browser would leave
# the page and show the picture.
_DROP = """
const shownBox = () => [...document.querySelectorAll(".multimodal-textbox textarea")]
    .find(box => box.offsetParent !== null);
const holdsFiles = event => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
const mark = on => document.body.classList.toggle("dropping", on);
document.addEventListener("dragover", event => {
    if (holdsFiles(event)) { event.preventDefault(); mark(Boolean(shownBox())); }
});
document.addEventListener("dragleave", event => { if (!event.relatedTarget) mark(false); });
document.addEventListener("drop", event => {
    mark(false);
    if (!holdsFiles(event)) return;
    const box = shownBox();
    const inBox = event.target.closest(".multimodal-textbox, .image-container");
    event.preventDefault();
    if (box && !inBox)
        box.dispatchEvent(new DragEvent("drop", {
            bubbles: true, cancelable: true, dataTransfer: event.dataTransfer,
        }));
}, true);
"""

# Two browser tabs store their chats in the same place. If the other tab has written there, a tab that comes
# to the front loads what is stored now, unless something is going on in it.
_TABS = f"""
let stale = false;
addEventListener("storage", event => {{ stale = stale || event.key === "{STORAGE_KEY}"; }});
document.addEventListener("visibilitychange", () => {{
    const typing = [...document.querySelectorAll("textarea")].some(box => box.value && box.offsetParent);
    const busy = document.querySelector(".stop-button");
    if (stale && !document.hidden && !typing && !busy) location.reload();
}});
"""

SCRIPT = f"(() => {{{_CLIPBOARD}{_DROP}{_TABS}}})();"

# JavaScript for a Gradio event: saves {"name", "text"} as a file.
SAVE_FILE = """
file => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([file.text], {type: "text/plain;charset=utf-8"}));
    link.download = file.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
"""
