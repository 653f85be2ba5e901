r"""What source data sets append to a question to say how it is to be answered, and how it is taken off again.

"Answer the question using a single word or phrase." and "think step by step" contradict each other: a style of ours
replaces the source's instruction. Only what stands at the end is taken off, and never the whole question.
"""

import re

MAX_INSTRUCTIONS = 8  # at the end of one question
MAX_CHARACTERS = 600  # of one instruction; the longest of those below has about 250

_NOUN = r"(?:a |one )?(?:single |short )?(?:word|phrase|number|integer|letter|option letter|sentence)"
_NOUNS = rf"(?:a|one)(?: single| short)? {_NOUN}(?:,? (?:or|and) {_NOUN}|, {_NOUN})*"
_ANSWER = (
    r"(?:answer|respond|reply)(?: to)?(?: (?:the|this)(?: (?:above|following|preceding))? question)?(?: directly)?"
)
_FINAL = r"(?:the|your)(?: final)? answer(?: \([^()\n]{1,40}\))?"
_PUT = r"(?:put|write|give|provide|state|output|enclose|present|place|return|box)"
_BOX = r"\$?(?:\\\\?boxed ?(?:\{[^{}\n]{0,30}\})?|\\\\?boxed\{\\text\{[^{}\n]{0,30}\}\}|a box)\$?"
_STEPS = r"(?:think|reason|work)(?: (?:through|about) (?:it|this|the problem))? step(?: |-)by(?: |-)step(?: first)?"

# A space stands for any white space. Case does not matter; an optional "please" in front is understood, as are
# brackets around the whole and a full stop behind it.
_ENGLISH = (
    # LLaVA 1.5, ShareGPT4V and what follows them
    rf"{_ANSWER} (?:using|with|in|by) (?:only |just )?{_NOUNS}(?: only)?",
    rf"{_ANSWER} (?:with|by|using)(?: only| just)?(?: the| a)?(?: correct| right| corresponding| given)?"
    r"(?: option['’]?s?)? ?letters?(?: of the (?:correct |right )?(?:option|choice|answer))?"
    r"(?: (?:from|of|among) the (?:given )?(?:choices|options))?(?: directly| only| alone| and nothing else)?",
    r"(?:select|choose|pick) the (?:correct|right|best) (?:answer|option|choice)(?: letter)? from the "
    r"(?:(?:given |above )?(?:options|choices)|(?:options|choices) above)(?: directly)?",
    rf"{_ANSWER}(?: (?:with|by|using|in))?(?: only| just| either)? [\"'“]?yes[\"'”]? or [\"'“]?no[\"'”]?(?: only)?",
    r"answer(?: the question)?(?: very)? (?:directly|briefly|concisely|shortly)(?: and (?:directly|concisely))?",
    r"(?:give|provide|write) a(?: very)? (?:short|brief|concise|direct|one-word) answer",
    r"(?:only (?:give|provide|output)|(?:give|provide|output) only) the(?: final| correct)? (?:answer|option letter)",
    # mathematics: MathVista's hints, boxes, and rationales in front of them
    r"(?:hint ?: ?)?(?:please )?answer the question(?: requiring [^\n]{1,60}?)? and provide the [^\n]{1,40}?, "
    r"e\.g\.,? [^\n]{1,60}?,? at the end",
    rf"(?:let['’]?s )?(?:{_STEPS},? (?:and |then )?(?:then )?)?(?:please )?{_PUT} {_FINAL} "
    rf"(?:in|within|inside|into|using|with) (?:a |the )?{_BOX}",
    rf"(?:the|your) final answer (?:must|should) be (?:put|enclosed|placed|given|written) (?:in|within|inside) {_BOX}",
    rf"(?:let['’]?s )?{_STEPS}(?: (?:before (?:answering|you answer)|to (?:answer|solve) (?:the|this) \w+))?",
    # R1 styles
    r"(?:you )?first think about the (?:reasoning process|question)[^\n.]{0,60}? and then "
    r"(?:provide|give) (?:the user with )?the (?:final )?answer",
    r"the reasoning process (?:must|should) be enclosed within <think> ?</think> tags",
    r"output the thinking process in <think> ?</think> and (?:the )?final answer(?: \([^()\n]{1,40}\))? in "
    r"<answer> ?</answer> tags",
    # ours and their relatives
    r"think step by step, then write \"final answer: ?\.{2,3}\" at the end",
    r"(?:think step by step\. )?the last line of your (?:response|answer) (?:must|should) (?:be|follow)[^\n]{1,120}?"
    r"(?:, with nothing but the answer in the box| \(without quotes\)[^\n]{0,120}?)?",
    r"first think step by step between <think> and </think>\. "
    r"after that, write \"final answer: ?\.{2,3}\" on a line of its own",
    r"(?:give step by step reasoning before you answer, and )?when you['’]?re ready to answer, please use the format "
    r"\"final answer: ?\.{2,3}\"",
)

_ZH_ANSWER = r"(?:来|进行)?(?:回答|作答|回复)(?:这个|该|上述|以下)?(?:问题)?"
_ZH_ONE = r"(?:一个|单个|简短的)?(?:单词|词语|词|短语|数字|整数|字母|选项字母|句子|短句)"
_ZH_STEPS = r"(?:一步一步地?|一步步地?|逐步地?)(?:进行)?(?:思考|推理|分析)"
_ZH_PUT = r"(?:放在?|写在?|填在?|置于|用)"

_CHINESE = (
    rf"(?:直接|只|仅)?(?:使用|用|以){_ZH_ONE}(?:(?:、|或者?|和){_ZH_ONE})*{_ZH_ANSWER}",
    r"(?:直接|只需?|仅需?)?(?:从[^\n。]{0,12}?中)?(?:使用|用|以)?(?:直接)?(?:回答|给出|选择|选出|输出)(?:出)?"
    r"(?:正确|对应|给定)?的?(?:选项|答案)的?字母(?:即可)?",
    rf"(?:直接|只|仅)?(?:使用|用|以)(?:给定|所给|正确)?(?:选项|选择)?中?的?(?:选项)?(?:的)?字母(?:直接)?{_ZH_ANSWER}",
    rf"(?:只|仅|直接)?(?:使用|用|以)?(?:回答|回复)?[“\"'‘]?(?:是|对)[”\"'’]?(?:或者?|还是|/)[“\"'‘]?(?:否|不是|错)[”\"'’]?"
    rf"(?:{_ZH_ANSWER})?",
    r"(?:直接|简短地?|简要地?|简洁地?)(?:回答|作答|给出答案)(?:问题)?",
    r"(?:直接|只需?|仅)给出(?:最终)?答案(?:即可)?",
    rf"(?:{_ZH_STEPS}[，,；;。]?(?:然后|并|再|最后)?)?(?:把|将)?(?:你的)?(?:最终|最后)?的?答案{_ZH_PUT}(?:入)?(?:到)?"
    r" ?\$?\\\\?boxed ?\{[^{}\n]{0,30}\}\$? ?(?:中|内|里|里面)?",
    rf"{_ZH_STEPS}(?:(?:后|之后)?再?(?:回答|作答))?",
    r"(?:提示[：:] ?)?(?:请)?回答(?:该|这个)?问题[，,]?并在(?:最后|末尾|结尾)(?:处)?(?:给出|提供|写出)[^\n。]{1,40}?"
    r"(?:[，,]?(?:例如|如|比如)[^\n]{1,60}?)?",
    # ours
    r"一步一步地思考，最后写出“最终答案：……”",
    r"一步一步地思考。回答的最后一行必须是“答案：\\boxed\{\.\.\.\}”，方框里只写答案",
    r"先在 <think> 和 </think> 之间一步一步地思考，然后另起一行写出“最终答案：……”",
)


def _at_end(instruction: str, polite: str) -> re.Pattern[str]:
    """The instruction where a sentence may start: on a line, after the end of a sentence, or with a capital letter."""
    start = r"(?:\A|\n|(?<=[.?!:)\]}\"'”’。？！：；，）】」…])|\s(?=[(（\[]?[A-Z\u3400-\u9fff]))"
    words = instruction.replace(" ?", r"\s{0,4}").replace(" ", r"\s{1,4}")
    return re.compile(rf"{start}\s*[(（\[]?(?i:{polite}(?:{words}))\s*[.。!！;；]?\s*[)）\]]?\s*\Z")


_PATTERNS = tuple(_at_end(words, r"(?:please\s+)?") for words in _ENGLISH) + tuple(
    _at_end(words, r"(?:请你?)?") for words in _CHINESE
)
_IMAGE = re.compile(r"<image>|<\|?image_pad\|?>|<img>")


def strip_instructions(question: str) -> str:
    r"""The question without the instructions at its end that say how to answer.

    Args:
        question: As a source data set has it.

    Returns:
        The question up to the first of these instructions, or unchanged when it ends with none. An instruction that
        is all there is stays: it is the question.

    >>> strip_instructions("What colour is the bus?\nAnswer the question using a single word or phrase.")
    'What colour is the bus?'
    >>> strip_instructions("How would one answer with a single word?")
    'How would one answer with a single word?'
    """
    for _ in range(MAX_INSTRUCTIONS):
        shorter = _without_last(question)
        if shorter is None:
            break
        question = shorter
    return question


def _without_last(question: str) -> str | None:
    """The question without its last instruction; None if there is none, or if nothing would be left."""
    end = len(question.rstrip())
    start = max(0, end - MAX_CHARACTERS)
    tail = question[start:end]
    found = [match.start() for pattern in _PATTERNS if (match := pattern.search(tail, 1 if start else 0))]
    if not found:
        return None
    shorter = question[: start + min(found)].rstrip().rstrip("，；")
    return shorter if re.search(r"\w", _IMAGE.sub("", shorter)) else None
