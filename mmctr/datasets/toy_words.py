"""The words of titles and descriptions of ToyWorld."""

from __future__ import annotations

# Words for each value, in the order of FACTOR_VALUES. No word stands for two values.
_WORDS = {
    "shape": "circle disc round|ring hoop loop|square block tile|triangle pyramid wedge|star starburst asterisk|"
    "cross plus crosspiece",
    "colour": "red crimson scarlet|orange tangerine amber|yellow lemon golden|green emerald fern|blue navy cobalt|"
    "purple violet plum|pink rose fuchsia|black ebony jet",
    "pattern": "solid plain uniform|striped stripy lined|dotted polka-dot spotted|checked chequered gingham",
    "size": "small mini petite|medium mid-size regular|large big oversized",
    "background": "cream-backed on-ivory|mint-backed on-jade|sky-backed on-azure|blush-backed on-peach",
}
WORDS = {name: [words.split() for words in text.split("|")] for name, text in _WORDS.items()}
_BRANDS = """Arvello Bontek Cassiro Dunvale Elmora Fintry Gradova Holmqvist Istria Jorvane
    Kelbrook Lumaro Morvek Nestano Ostrava Pellmar Quenby Rostova Silvano Tarkin"""
_FILLERS = "new classic premium original handmade limited everyday deluxe signature essential gift vintage"
BRANDS, FILLERS = _BRANDS.split(), _FILLERS.split()
