"""The chat page's markdown in a real browser: the nodes that it makes, of whole texts and growing ones, and attacks."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from clients.browser import ChatPage, OpenPage, chromium, open_page  # noqa: F401
from puna.serving.state import ServerSettings, ServerState
from serving.conftest import listening

# Renders texts, each as it grows, into one element; gives what that element then holds.
RENDER = """async ([texts, isShown]) => {
    const { MarkdownView } = await import("/page/markdown.js");
    const root = document.createElement("div");
    if (isShown) document.getElementById("messages").replaceChildren(root);
    const view = new MarkdownView(root);
    for (const text of texts) {
        const start = performance.now();
        view.update(text);
        if (performance.now() - start > 10_000) throw new Error("hangs");
    }
    return root.innerHTML;
}"""
TAGS = re.compile(
    "div|span|button|pre|code|p|a|h[3-6]|ul|ol|li|blockquote|table|thead|tbody|tr|th|td|hr|br|em|strong|del"
)
ATTRIBUTES = re.compile("class|type|tabindex|role|aria-label|href|target|rel|start")
SAFE = 'target="_blank" rel="noopener noreferrer"'


@pytest.fixture
def page(open_page: OpenPage) -> Iterator[ChatPage]:  # noqa: F811
    with listening(ServerState(ServerSettings(model_name="none"))) as running, open_page(running.url) as chat:
        yield chat


def render(chat: ChatPage, *texts: str, shown: bool = False) -> str:
    html: str = chat.page.evaluate(RENDER, [list(texts), shown])
    return html


def link(address: str, text: str) -> str:
    return f'<a href="{address}" {SAFE}>{text}</a>'


def code(label: str, text: str) -> str:
    named = f", {label}" if label else ""
    return (
        f'<div class="code"><div class="code-head"><span>{label or "code"}</span>'
        '<button type="button" class="copy-code">Copy</button></div>'
        f'<pre tabindex="0" role="group" aria-label="Code{named}"><code>{text}</code></pre></div>'
    )


def table(inside: str) -> str:
    return f'<div class="table" tabindex="0" role="group" aria-label="Table"><table>{inside}</table></div>'


# Where CommonMark and GitHub's tables say something, this is it, but for line breaks, which are kept, the levels of
# headings, and lists' text, which is in a <p> in tight lists as well.
EXPECTED = (
    ("", ""),
    ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
    ("a  \r\nb\\\nc", "<p>a<br>b<br>c</p>"),
    ("# A\n## *B* ##\n####### C", "<h3>A</h3><h4><em>B</em></h4><p>####### C</p>"),
    ("#hash\n# ", "<p>#hash</p><h3></h3>"),
    ("---\n***\n_ _ _", "<hr><hr><hr>"),
    ("*a* **b** ***c*** _d_ __e__ ~~f~~ ~g~", "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> "
     "<em>d</em> <strong>e</strong> <del>f</del> ~g~</p>"),
    ("*a **b** c* **a *b* c**", "<p><em>a <strong>b</strong> c</em> <strong>a <em>b</em> c</strong></p>"),
    ("snake_case_name 2 * 3 * 4 a*b*c **x", "<p>snake_case_name 2 * 3 * 4 a<em>b</em>c **x</p>"),
    ("*(**foo**)* **foo*", "<p><em>(<strong>foo</strong>)</em> *<em>foo</em></p>"),
    ("**“强调”**文字 **加粗。**后面", "<p><strong>“强调”</strong>文字 <strong>加粗。</strong>后面</p>"),
    (r"\*a\* \\ \a `\*`", r"<p>*a* \ \a <code>\*</code></p>"),
    ("`a` ``b`c`` ` d ` ```e", "<p><code>a</code> <code>b`c</code> <code>d</code> ```e</p>"),
    ("*a `b* c` d*", "<p><em>a <code>b* c</code> d</em></p>"),
    ("&lt;b&gt; &amp;amp; &copy; a<br>b<br/>c", "<p>&lt;b&gt; &amp;amp; &amp;copy; a<br>b<br>c</p>"),
    ("[a *b*](https://x.org/y \"t\") [m](mailto:a@b.org)",
     f"<p>{link('https://x.org/y', 'a <em>b</em>')} {link('mailto:a@b.org', 'm')}</p>"),
    ("[a](https://x.org/f_(g)) [b] [c](not an address) [d]()",
     f"<p>{link('https://x.org/f_(g)', 'a')} [b] [c](not an address) [d]()</p>"),
    ("[a [b](https://x.org/) c](mailto:a@b)", f"<p>[a {link('https://x.org/', 'b')} c](mailto:a@b)</p>"),
    ("see https://x.org/a_b, (https://x.org/) or <https://y.org/>.",
     f"<p>see {link('https://x.org/a_b', 'https://x.org/a_b')}, ({link('https://x.org/', 'https://x.org/')}) or "
     f"{link('https://y.org/', 'https://y.org/')}.</p>"),
    ("![alt](https://x.org/p.png)", f"<p>{link('https://x.org/p.png', 'alt')}</p>"),
    ("[![alt](https://x.org/p.png)](https://y.org/)", f"<p>{link('https://y.org/', 'alt')}</p>"),
    ("- a\n- b\n  - c\n    d\n- e", "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c<br>d</p></li></ul></li>"
     "<li><p>e</p></li></ul>"),
    ("1. a\n   - b\n2. c", "<ol><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ol>"),
    ("3) a\n\n4) b", '<ol start="3" class="loose"><li><p>a</p></li><li><p>b</p></li></ol>'),
    ("- a\n\n  b\n- c", '<ul class="loose"><li><p>a</p><p>b</p></li><li><p>c</p></li></ul>'),
    ("- a\n* b", "<ul><li><p>a</p></li></ul><ul><li><p>b</p></li></ul>"),
    ("- [ ] a\n- [x] b", '<ul><li class="task"><p>☐ a</p></li><li class="task"><p>☑ b</p></li></ul>'),
    ("born in\n1984. Then\n- x", "<p>born in<br>1984. Then</p><ul><li><p>x</p></li></ul>"),
    ("- a\n\nb", "<ul><li><p>a</p></li></ul><p>b</p>"),
    ("> a\n> > b\n>\n> - c\n\nd", "<blockquote><p>a</p><blockquote><p>b</p></blockquote><ul><li><p>c</p></li></ul>"
     "</blockquote><p>d</p>"),
    ("```\n<b> *a*\n\n  c\n```\nd", f"{code('', '&lt;b&gt; *a*' + chr(10) * 2 + '  c')}<p>d</p>"),
    ("~~~~md\n```\na\n```\n~~~~", code("md", "```\na\n```")),
    ("````\n```js\na\n```\n````", code("", "```js\na\n```")),
    ("- a\n  ```sh\n  b\n    c\n  ```", f"<ul><li><p>a</p>{code('sh', 'b' + chr(10) + '  c')}</li></ul>"),
    ("```c++ title=\"x\"\nopen", code("c++", "open")),
    ("```py\nif a: # b\n    return \"c\", 1.5\n```", code("py", '<span class="keyword">if</span> a: '
     '<span class="comment"># b</span>\n    <span class="keyword">return</span> <span class="string">"c"</span>, '
     '<span class="number">1.5</span>')),
    ("| a | b |\n|:-:|--:|\n| `c\\|d` | *e* | f |\n| g |\n\nh", table(
        '<thead><tr><th class="center">a</th><th class="right">b</th></tr></thead><tbody><tr><td class="center">'
        '<code>c|d</code></td><td class="right"><em>e</em></td></tr><tr><td class="center">g</td></tr></tbody>')
     + "<p>h</p>"),
    ("a | b\n--- | ---\nc | d", table("<thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>c</td><td>d</td></tr>"
     "</tbody>")),
    ("a | b\n---", "<p>a | b</p><hr>"),
    ("so\na|b\n- | -\n\n- c\n\n  d|e\n  -|-", "<p>so</p>"
     + table("<thead><tr><th>a</th><th>b</th></tr></thead><tbody></tbody>") + "<ul><li><p>c</p>"
      + table("<thead><tr><th>d</th><th>e</th></tr></thead><tbody></tbody>") + "</li></ul>"),
    ("- ```\n  a\n\n  b\n\n\nc", f"<ul><li>{code('', 'a' + chr(10) * 2 + 'b')}</li></ul><p>c</p>"),
    ("- a\n  - b\n\n    c\n- d",
     '<ul><li><p>a</p><ul class="loose"><li><p>b</p><p>c</p></li></ul></li><li><p>d</p></li></ul>'),
    ("<script>alert(1)</script>\n<img src=x onerror=alert(1)>",
     "<p>&lt;script&gt;alert(1)&lt;/script&gt;<br>&lt;img src=x onerror=alert(1)&gt;</p>"),
)  # fmt: skip


def test_nodes(page: ChatPage) -> None:
    found = [(text, render(page, text)) for text, _ in EXPECTED]
    assert found == [(text, html) for text, html in EXPECTED]


def test_growing_text_gives_the_same_nodes(page: ChatPage) -> None:
    samples = [text for text, _ in EXPECTED]
    samples.append("\n\n".join(samples))
    generator = random.Random(5)
    pieces = ["*", "**", "_", "`", "```", "\n", "\n\n", "- ", "1. ", "> ", "# ", "|", "---", "[", "](http://x.org)",
              "a", "b c", "  ", "    ", "\\", "~~", "<br>", "|-|-|\n"]  # fmt: skip
    samples += ["".join(generator.choices(pieces, k=60)) for _ in range(300)]
    for text in samples:
        grown = render(page, *(text[:end] for end in range(len(text) + 1)))
        assert grown == render(page, text), repr(text)
        cuts = sorted(generator.choices(range(len(text) + 1), k=4))
        assert render(page, *(text[:end] for end in cuts), text) == grown, repr(text)


def test_finished_blocks_are_not_rendered_again(page: ChatPage) -> None:
    kept = page.page.evaluate(
        """async () => {
            const { MarkdownView } = await import("/page/markdown.js");
            const root = document.createElement("div");
            const view = new MarkdownView(root);
            view.update("# a\\n\\nb\\n\\n```py\\nx = 1");
            const [heading, paragraph, code] = root.children;
            const text = code.querySelector("code").firstChild;
            view.update("# a\\n\\nb\\n\\n```py\\nx = 12\\ny = 3");
            const isSame = root.contains(text) && text.data === "x = 12\\ny = 3" && code === root.children[2];
            const code_ = "# a\\n\\nb\\n\\n```py\\nx = 12\\ny = 3\\n```\\n\\n";
            const before = code_ + "- c\\n  > d\\n\\n  | e | f |\\n  |---|---|\\n";
            view.update(before + "  | g");
            const last = root.querySelector("tbody tr");
            const nodes = [...root.querySelectorAll("*")].filter((node) => !last.contains(node));
            view.update(before + "  | g | h |\\n- i\\n\\nj");
            const isThere = nodes.every((node) => root.contains(node));
            return [isSame, root.children[0] === heading, root.children[1] === paragraph, isThere, nodes.length];
        }"""
    )
    assert kept == [True, True, True, True, 22]


SENTENCE = "some *text* and `code`, 長い文。 "
LONG = {
    "list": "- " + SENTENCE + "\n",
    "list in an item": "   1. " + SENTENCE + "\n",
    "loose list": "- " + SENTENCE + "\n\n",
    "quote": "> " + SENTENCE + "\n>\n",
    "table": f"| {SENTENCE} | b |\n",
    "lines": SENTENCE + "\n",
    "one line": SENTENCE,
    "code": "    x = 1  # " + SENTENCE + "\n",
}
BEGINNINGS = {"list in an item": "- So:\n", "table": "| a | b |\n|---|---|\n", "code": "```py\n"}


@pytest.mark.parametrize("name", list(LONG))
def test_only_the_end_of_a_long_block_is_rendered_again(page: ChatPage, name: str) -> None:
    """As many nodes for a token as there are in a paragraph's last part, however long the block is."""
    text = BEGINNINGS.get(name, "") + LONG[name] * 2000
    made, total, whole, grown = page.page.evaluate(
        """async (text) => {
            const { MarkdownView } = await import("/page/markdown.js");
            let made = 0;
            for (const method of ["createElement", "createTextNode"]) {
                const original = document[method].bind(document);
                document[method] = (...args) => { made++; return original(...args); };
            }
            const [once, root] = [document.createElement("div"), document.createElement("div")];
            new MarkdownView(once).update(text);
            const view = new MarkdownView(root);
            view.update(text.slice(0, -200));
            const most = [];
            for (let end = text.length - 199; end <= text.length; end++) {
                made = 0;
                view.update(text.slice(0, end));
                most.push(made);
            }
            return [Math.max(...most), root.querySelectorAll("*").length, once.innerHTML, root.innerHTML];
        }""",
        text,
    )
    assert whole == grown
    if name == "code":
        assert made == 0
    else:
        assert total > 4000
        assert made < {"lines": 600, "one line": 600}.get(name, 10)


def test_long_paragraphs_come_whole(page: ChatPage) -> None:
    """Emphasis may end where a part does; no character is lost, and what grows is the same as what came at once."""
    for text in (SENTENCE * 1000, "**" + "word " * 3000 + "**", "字" * 9000 + "。" + "字" * 9000, "x" * 20_000):
        cuts = range(0, len(text), 997)
        html = render(page, *(text[:end] for end in cuts), text)
        assert html == render(page, text)
        shown = re.sub("<[^>]*>", "", html)
        assert re.sub(r"[*`\s]", "", shown) == re.sub(r"[*`\s]", "", text)


ATTACKS = (
    "<script>window.hit=1</script>",
    "<img src=x onerror='window.hit=1'>",
    "<svg onload=window.hit=1><iframe srcdoc='<script>top.hit=1</script>'>",
    "[a](javascript:window.hit=1) [b](JaVaScRiPt:window.hit=1) [c](java\tscript:window.hit=1)",
    "[a](&#106;avascript:window.hit=1) [b](\x01javascript:window.hit=1) [c]( javascript:window.hit=1)",
    "[a](data:text/html,<script>window.hit=1</script>) [b](vbscript:x) [c](file:///etc/passwd) [d](blob:x)",
    "<javascript:window.hit=1> <data:text/html,x> [a]: javascript:window.hit=1",
    "![x](javascript:window.hit=1) ![x](x\"onerror=\"window.hit=1) ![](/v1/models)",
    "[a](https://x.org/\"onmouseover=\"window.hit=1) [b](https://x.org/' onclick='window.hit=1)",
    "[a](https://x.org \"t\" onclick=window.hit=1) https://x.org/\"onclick=window.hit=1//",
    "```\"><img src=x onerror=window.hit=1>\ncode\n```",
    "```html\n</code></pre><script>window.hit=1</script>\n```",
    "````\n```\n<script>window.hit=1</script>\n```\n````\n```\n~~~\n</textarea><script>window.hit=1</script>",
    "| <script>window.hit=1</script> | b |\n|---|---|\n| <img src=x onerror=window.hit=1> | [x](javascript:hit=1) |",
    "# <base href=https://x.org> <meta http-equiv=refresh content='0;url=https://x.org'>",
    "<form action=https://x.org><button>x</button></form><style>*{display:none}</style><a href=javascript:hit=1>x",
    "<!--><img src=x onerror=window.hit=1>--> <![CDATA[<script>window.hit=1</script>]]>",
    "\u202e\u2028\u0000<script\u0000>window.hit=1</script>",
    "[__proto__](https://x.org/) `constructor` ```__proto__\nx\n```",
)  # fmt: skip


def test_nothing_that_a_model_writes_is_executed(page: ChatPage) -> None:
    """The texts in the page itself, clicked on; the page's own problems include other requests and dialogs."""
    text = "\n\n".join(ATTACKS)
    for attack in (*ATTACKS, text, *(f"> - {line}" for line in ATTACKS)):
        render(page, attack, shown=True)
        found = page.page.evaluate(
            """() => {
                const root = document.getElementById("messages");
                const nodes = [...root.querySelectorAll("*")];
                for (const node of nodes) {
                    node.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
                    if (node.tagName !== "A") node.click?.();
                }
                return {
                    tags: nodes.map((node) => node.tagName.toLowerCase()),
                    attributes: nodes.flatMap((node) => node.getAttributeNames()),
                    links: nodes.filter((node) => node.tagName === "A").map((node) => [node.protocol, node.rel]),
                };
            }"""
        )
        assert not [tag for tag in found["tags"] if not TAGS.fullmatch(tag)], attack
        assert not [name for name in found["attributes"] if not ATTRIBUTES.fullmatch(name)], attack
        for protocol, rel in found["links"]:
            assert (protocol in ("http:", "https:", "mailto:"), rel) == (True, "noopener noreferrer"), attack
    page.page.wait_for_timeout(200)  # time for an image to fail, were there one
    assert page.page.evaluate("window.hit") is None


def test_browser_itself_refuses_html_from_strings(page: ChatPage) -> None:
    """Trusted types: should someone write innerHTML into the page one day, nothing comes of it."""
    refused = page.page.evaluate(
        """() => {
            try {
                document.getElementById("messages").innerHTML = "<img src=x onerror=window.hit=1>";
                return false;
            } catch (error) {
                return error instanceof TypeError;
            }
        }"""
    )
    assert refused
    page.problems.clear()  # the browser reports what it refused


SIZE = 200_000
HUGE = {
    "stars": "*" * SIZE,
    "stars and letters": "*a " * (SIZE // 3),
    "strong, never closed": "**a " * (SIZE // 4),
    "strong, nested": "**a " * (SIZE // 8) + "a** " * (SIZE // 8),
    "run of stars on both sides": "*" * (SIZE // 2) + "a" + "*" * (SIZE // 2),
    "stars and underscores": "*a _b " * (SIZE // 6),
    "crossing": "*a **b* c** " * (SIZE // 12),
    "tildes": "~~a " * (SIZE // 4),
    "brackets": "[" * SIZE,
    "brackets of both kinds": "[" * (SIZE // 2) + "]" * (SIZE // 2),
    "links that do not end": "[a](" * (SIZE // 4),
    "link ends": "](x" * (SIZE // 3),
    "links": "[a](http://x.org) " * (SIZE // 18),
    "nested links": "[" * (SIZE // 14) + "](http://x.org)" * (SIZE // 14),
    "stars before links": "*a " * (SIZE // 6) + "[x](http://x.org)" * (SIZE // 34),
    "titles": '](x "' * (SIZE // 5),
    "target of spaces": "[a](" + " " * SIZE,
    "images": "![" * (SIZE // 2),
    "backticks": "`" * SIZE,
    "backtick runs of all lengths": " ".join("`" * n for n in range(1, 630)),
    "backticks, odd": "`a" * (SIZE // 2),
    "backtick and spaces": "` " + "a" * SIZE + "`",
    "angles": "<" * SIZE,
    "addresses": "<http://" * (SIZE // 8),
    "bare addresses": "http://" * (SIZE // 7),
    "address of signs": "http://x" + "!?" * (SIZE // 2),
    "parentheses": "http://x" + ")" * SIZE,
    "backslashes": "\\" * SIZE,
    "ampersands": "&" * SIZE,
    "quotes": ">" * SIZE,
    "quoted lists": "> - " * (SIZE // 4),
    "list in list": "- " * (SIZE // 2) + "x",
    "numbers": "1. " * (SIZE // 3),
    "items": "- a\n" * (SIZE // 4),
    "deeper and deeper": "\n".join(" " * (2 * n) + "- a" for n in range(300)),
    "lines": "\n" * SIZE,
    "blank items": "- a" + "\n" * SIZE + "b",
    "rules": "---\n" * (SIZE // 4),
    "rule that is none": "* " * (SIZE // 2) + "x",
    "spaces": "a" + " " * SIZE + "b",
    "hashes": "#" * SIZE,
    "heading of spaces and a line separator": "#" + " " * SIZE + "\u2028a",
    "item of spaces and a line separator": "-" + " " * SIZE + "\u2028a",
    "heading of hashes": "# " + "# " * (SIZE // 2) + "x",
    "fences": "```\n" * (SIZE // 4),
    "fence of tildes": "~" * SIZE + "`",
    "fence, spaces and a backtick": "```" + " " * SIZE + "`",
    "pipes": "|" * SIZE,
    "table of many columns": "|a" * (SIZE // 4) + "|\n" + "|-" * (SIZE // 4) + "|\n" + "|\n" * (SIZE // 8),
    "table of spaces": "|a\n|" + " " * SIZE + "-x",
    "rows": "a|b\n-|-\n" + "c|d\n" * (SIZE // 4),
    "comments": "```js\n" + "/*" * 9_000 + "\n```",
    "strings": "```js\n" + "`\"'" * 6_000 + "\n```",
    "triple quotes": "```py\n" + '"""' * 6_000 + "\n```",
}  # fmt: skip


@pytest.mark.parametrize("name", list(HUGE))
def test_huge_texts_do_not_hang(page: ChatPage, name: str) -> None:
    """Linear time is a second at most for each; what is quadratic takes half a minute and more, which is hanging."""
    text = HUGE[name]
    html = render(page, text)
    assert html or not text.strip()
    # And as it would be streamed, in pieces.
    step = len(text) // 8
    assert render(page, *(text[:end] for end in range(0, len(text), step)), text) == html


def test_nodes_are_never_nested_by_the_thousand(page: ChatPage) -> None:
    """On which a browser's own recursion would end."""
    for name in ("strong, nested", "run of stars on both sides", "quotes", "list in list", "deeper and deeper"):
        render(page, HUGE[name], shown=True)
        depth = page.page.evaluate(
            """() => {
                const depth = (node) => 1 + Math.max(0, ...[...node.children].map(depth));
                return depth(document.getElementById("messages"));
            }"""
        )
        assert 16 < depth < 100, name


def test_other_schemes_are_no_links(page: ChatPage) -> None:
    schemes: list[Any] = [
        "javascript:x",
        "data:x",
        "vbscript:x",
        "file:///x",
        "//x.org",
        "/x",
        "x",
        "http://",
        "ftp://x",
    ]
    schemes += ["jAvAsCrIpT:x", "\tjavascript:x", "https:x.org", "HTTP://X.org/", "mailto:a@b"]
    safe = page.page.evaluate(
        "async (all) => { const { safeAddress } = await import('/page/inline.js'); return all.map(safeAddress); }",
        schemes,
    )
    assert safe == [None] * 11 + ["https://x.org/", "http://x.org/", "mailto:a@b"]
