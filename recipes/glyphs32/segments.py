"""Which segments or dots of a display make each symbol. Tables only: no drawing.

Segment names: ``a`` top, ``b`` upper right, ``c`` lower right, ``d`` bottom, ``e`` lower left, ``f`` upper
left, ``g`` middle, split into ``1`` (left) and ``2`` (right) on fourteen-segment faces. Their inner strokes
are ``h`` upper left diagonal, ``i`` upper vertical, ``j`` upper right diagonal, ``k`` lower left diagonal,
``l`` lower vertical and ``m`` lower right diagonal.
"""

from __future__ import annotations

#: Seven-segment forms; makers disagree on the tails of 6, 7 and 9.
SEVEN: dict[str, tuple[str, ...]] = {
    "0": ("abcdef",),
    "1": ("bc",),
    "2": ("abged",),
    "3": ("abgcd",),
    "4": ("fgbc",),
    "5": ("afgcd",),
    "6": ("afgedc", "afgedc", "fgedc"),
    "7": ("abc", "abc", "fabc"),
    "8": ("abcdefg",),
    "9": ("abcdfg", "abcdfg", "abcfg"),
    "A": ("abcefg",),
    "C": ("adef",),
    "E": ("adefg",),
    "F": ("aefg",),
    "H": ("bcefg",),
    "J": ("bcde",),
    "L": ("def",),
    "P": ("abefg",),
    "U": ("bcdef",),
}

#: Fourteen-segment forms of the letters.
FOURTEEN: dict[str, str] = {
    "A": "abcef12", "B": "abcd2il", "C": "adef", "D": "abcdil", "E": "adef12", "F": "aef12",
    "G": "acdef2", "H": "bcef12", "I": "adil", "J": "bcde", "K": "ef1jm", "L": "def",
    "M": "bcefhj", "N": "bcefhm", "O": "abcdef", "P": "abef12", "Q": "abcdefm", "R": "abef12m",
    "S": "acdf12", "T": "ail", "U": "bcdef", "V": "efjk", "W": "bcefkm", "X": "hjkm",
    "Y": "hjl", "Z": "adjk",
}  # fmt: skip

#: 5x7 dot forms, one hexadecimal column pair per row, top row first; bit 4 is the left dot.
DOTS: dict[str, str] = {
    "0": "0E11131519110E", "1": "040C040404040E", "2": "0E11010204081F", "3": "1F02040201110E",
    "4": "02060A121F0202", "5": "1F101E0101110E", "6": "0608101E11110E", "7": "1F010204080808",
    "8": "0E11110E11110E", "9": "0E11110F01020C", "A": "0E11111F111111", "B": "1E11111E11111E",
    "C": "0E11101010110E", "D": "1E11111111111E", "E": "1F10101E10101F", "F": "1F10101E101010",
    "G": "0E11101711110F", "H": "1111111F111111", "I": "0E04040404040E", "J": "0702020202120C",
    "K": "11121418141211", "L": "1010101010101F", "M": "111B1515111111", "N": "11111915131111",
    "O": "0E11111111110E", "P": "1E11111E101010", "Q": "0E11111115120D", "R": "1E11111E141211",
    "S": "0F10100E01011E", "T": "1F040404040404", "U": "1111111111110E", "V": "11111111110A04",
    "W": "1111111515150A", "X": "11110A040A1111", "Y": "1111110A040404", "Z": "1F01020408101F",
}  # fmt: skip

#: Other 5x7 digits found on meters: an open zero, round or square corners.
DOTS_OTHER: dict[str, tuple[str, ...]] = {
    "0": ("0E11111111110E", "0E11111111110E", "1F11111111111F"),
    "1": ("04040404040404", "01030501010101"),
    "2": ("0E11010E10101F", "1E01010E10101F"),
    "3": ("0E11010601110E", "1E01010E01011E", "1F01010F01011F"),
    "4": ("1111111F010101", "0206060A1F0202"),
    "5": ("1F10101E01111E", "1F10101E01011E"),
    "6": ("0E11101E11110E", "0E10101E11110E"),
    "7": ("1F010102040404", "1F010101010101"),
    "8": ("1F11111F11111F",),
    "9": ("0E11110F01110E", "0E11110F01010E"),
}
