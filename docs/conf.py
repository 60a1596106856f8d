"""Sphinx configuration: `make docs` builds the site, without a network."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from pathlib import Path

import matplotlib
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever else may be installed
matplotlib.use("Agg")

import sklearn_maml  # noqa: E402

project = "sklearn_maml"
author = "the sklearn_maml developers"
copyright = author
version = release = sklearn_maml.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_parser",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "**.ipynb", "sg_execution_times.rst", "**/sg_execution_times.rst"]
templates_path = ["_templates"]
nitpicky = True
# Other projects' documentation is not consulted: that would take a network.
nitpick_ignore_regex = [("py:.*", r"(sklearn|skorch|torch)\..*")]
default_role = "literal"
smartquotes = False  # quotes in types of parameters are code

# --- pages

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# Files that are read on the web as they are link to each other by their paths in the repository.
SITE_PAGES = {"../benchmarks/RESULTS.md": "results.md", "../README.md": "index.md"}

# --- docstrings

autosummary_generate = True
autodoc_typehints = "none"  # numpydoc says more
autodoc_member_order = "groupwise"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
numpydoc_xref_param_type = False
# Inherited from scikit-learn, and documented there.
INHERITED = re.compile(r"get_params|set_params|get_metadata_routing|set_\w+_request")
PUBLIC_MODULES = [
    "sklearn_maml.inspection",  # where what is also in `sklearn_maml` is documented
    "sklearn_maml",
    "sklearn_maml.datasets",
    "sklearn_maml.exceptions",
    "sklearn_maml.meta_gradients",
    "sklearn_maml.modules",
    "sklearn_maml.update_rules",
]

# --- gallery

warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive", UserWarning)
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"^(?!plot_)",
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    "write_computation_times": False,
    "remove_config_comments": True,
    "plot_gallery": "True",
    "min_reported_time": 1e9,
    "doc_module": ("sklearn_maml",),
    "reference_url": {"sklearn_maml": None},
    "backreferences_dir": None,
}
suppress_warnings = ["config.cache"]  # sphinx-gallery's configuration cannot be pickled

# --- output

html_theme = "pydata_sphinx_theme"
html_title = "sklearn_maml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "sklearn_maml"},
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
    "show_prev_next": True,
}
# pages without pages below them need no navigation at their side
ALONE = ["index", "install", "quickstart", "choosing", "faq", "migrating", "methods", "defaults"]
ALONE += ["tutorial", "engine", "results", "changelog", "contributing"]
html_sidebars = {page: [] for page in ALONE}


def link_site_pages(app, docname, source):
    """Let links between files of the repository lead to pages of the site."""
    for path, page in SITE_PAGES.items():
        prefix = "../" * docname.count("/")
        source[0] = source[0].replace(f"]({path}", f"]({prefix}{page}")


def skip_member(app, what, name, obj, skip, options):
    """Leave out what scikit-learn wrote and documents."""
    home = getattr(obj, "__module__", None) or ""
    return True if home.startswith("sklearn.") or INHERITED.fullmatch(name) else skip


def public_names():
    """Map short and dotted names of public classes, functions and methods to full names."""
    found = {}
    for module_name in PUBLIC_MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            full = found.setdefault(name, f"{module_name}.{name}")
            found[f"{module_name}.{name}"] = full
    # `adapt` is a method more often than the function of this name
    return {name: full for name, full in found.items() if name not in ("adapt", "Adam")}


def link_public_names(app, doctree):
    """Let names of what is public, wherever they are set as code, lead to its page."""
    page = app.env.docname.rpartition("/")[2]
    for literal in list(doctree.findall(nodes.literal)):
        target = PUBLIC.get(literal.astext())
        around = literal.parent
        while around and not isinstance(around, (nodes.title, nodes.reference, pending_xref)):
            around = around.parent
        if target is None or target == page or around:
            continue
        link = pending_xref(
            "",
            literal.deepcopy(),
            refdoc=app.env.docname,
            refdomain="py",
            reftype="obj",
            reftarget=target,
            refexplicit=True,
            refwarn=False,  # not everything public has a page
        )
        literal.replace_self(link)


def drop_unresolved(app, env, node, contnode):
    """Show names without a page, such as helpers in a module's `__all__`, as literal text."""
    return contnode if node.get("reftarget") in PUBLIC.values() else None


def mathml(node, as_block):
    # docutils knows these dots by one of their names
    return tex2mathml(node.astext().replace(r"\dots", r"\ldots"), as_block=as_block)


def inline_math(self, node):
    self.body.append(mathml(node, as_block=False))
    raise nodes.SkipNode


def display_math(self, node):
    if node["number"]:
        raise NotImplementedError("Numbered equations are not drawn; leave the label out.")
    self.body.append(f'<div class="math">{mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


PUBLIC = public_names()


def setup(app):
    app.connect("source-read", link_site_pages)
    app.connect("doctree-read", link_public_names)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("missing-reference", drop_unresolved)
    # Browsers draw MathML themselves: no scripts, no fonts, nothing to download.
    app.add_html_math_renderer(
        "mathml", inline_renderers=(inline_math, None), block_renderers=(display_math, None)
    )
    app.config.html_math_renderer = "mathml"
