"""Words and phrases that captions exchange for one another: which exclude each other, and what must not be nearby."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = ("object", "count", "colour", "place")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True, slots=True)
class Concept:
    """Something that a caption can name.

    Args:
        name (`str`): of the concept.
        forms (`tuple` of `str`): how it is named, in lower case.
        blockers (`frozenset` of `str`): a caption with one of these may be speaking of it.
        rivals (`frozenset` of `str`): other concepts of the group that it does not surely exclude.
    """

    name: str
    forms: tuple[str, ...]
    blockers: frozenset[str]
    rivals: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Group:
    """Concepts of one `kind` of which each can take the place of any other.

    Args:
        name, kind (`str`): of the group; the kind is one of [`KINDS`].
        concepts (`tuple` of [`Concept`]): what is exchanged.
        not_after, not_before (`frozenset` of `str`): words next to which a form means something else.
        only_before (`frozenset` of `str`, *optional*): the words that may follow, "$" for the end; others may not.
        not_beside (`frozenset` of `str`): words of a caption that would tell by themselves.
    """

    name: str
    kind: str
    concepts: tuple[Concept, ...]
    not_after: frozenset[str] = frozenset()
    not_before: frozenset[str] = frozenset()
    only_before: frozenset[str] | None = None
    not_beside: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a word or phrase in a caption: what stands there, characters `start` to `end`, and the words on its
    `left` and `right` in lower case ("^" and "$" at the ends, "a" for "an")."""

    group: Group
    concept: Concept
    form: str
    start: int
    end: int
    left: str
    right: str


COLOURS = {
    # Name: other names, and colours that may be taken for it.
    "red": ("maroon", "orange pink"),
    "blue": ("navy teal turquoise", "purple"),
    "green": ("teal turquoise", ""),
    "black": ("dark", "gray brown"),
    "white": ("", "gray"),
    "yellow": ("gold golden blond blonde", "orange"),
    "orange": ("", "red yellow brown"),
    "brown": ("tan beige dark", "orange black"),
    "pink": ("", "red purple"),
    "purple": ("violet lavender", "pink blue"),
    "gray": ("grey silver", "white black"),
}
ANY_COLOUR = _words("colorful colored multicolored multi-colored colors rainbow")
# Nouns that have their colour in nearly every photo, and pairs that mean something else.
OWN_COLOUR = _words(
    "grass sky tree trees snow sand water leaves bear bears juice wine beans peppers pepper onions onion broccoli "
    "hair haired light lights cross man woman men women boy girl person people boys girls photo photograph picture "
    "photos"
)

NUMBERS = {
    "two": "2 couple pair both twin twins double",
    "three": "3 trio",
    "four": "4",
    "five": "5",
    "six": "6",
}
SEVERAL = _words("several many group crowd bunch herd flock team some row line multiple various lots")

MALE = _words(
    "man men guy guys gentleman gentlemen boy boys male males he his him himself father dad son brother husband groom "
    "cowboy businessman policeman fireman"
)
FEMALE = _words(
    "woman women lady ladies girl girls female females she her hers herself mother mom daughter sister wife bride "
    "cheerleader cheerleaders waitress grandmother"
)
SEVERAL_PEOPLE = _words(
    "people persons couple couples family families group groups crowd team teams friends others children kids babies "
    "adults players everyone audience spectators pedestrians tourists passengers workers skiers surfers riders "
    "skaters students pair trio twins bunch class band fans teenagers youths toddlers teens individuals each"
)
PEOPLE = SEVERAL_PEOPLE | _words(
    "person child kid toddler baby infant adult someone somebody player rider skier surfer skater snowboarder human "
    "skateboarder biker cyclist bicyclist motorcyclist worker officer owner driver swimmer climber hiker athlete "
    "batter pitcher catcher runner jogger teenager youth teen police hand hands arm arms lap pedestrian jockey "
    "performer wakeboarder kayaker trainer it's individual"
)
ANIMALS = _words("animal animals pet pets creature creatures wildlife")
SEVERAL_ANIMALS = _words("animals pets wildlife zoo")
DOG = _words(
    "dog dogs puppy puppies pup canine hound hounds retriever terrier poodle collie labrador lab greyhound greyhounds "
    "dalmatian shepherd bulldog husky doberman pitbull dachshund"
)
BEASTS = {
    "dog": ("dog", "dogs", DOG),
    "cat": ("cat", "cats", _words("cat cats kitten kittens kitty feline")),
    "horse": ("horse", "horses", _words("horse horses pony ponies horseback colt jockey rodeo")),
    "bird": ("bird", "birds", _words("bird birds duck ducks seagull seagulls pigeon pigeons parrot owl goose geese")),
    "cow": ("cow", "cows", _words("cow cows cattle bull bulls calf ox")),
    "elephant": ("elephant", "elephants", _words("elephant elephants")),
    "giraffe": ("giraffe", "giraffes", _words("giraffe giraffes")),
    "zebra": ("zebra", "zebras", _words("zebra zebras")),
    "bear": ("bear", "bears", _words("bear bears cub cubs")),
}
# (forms, forms of several, words that may mean it, concepts that it may be taken for)
THINGS = {
    "vehicles": {
        "car": ("car", "cars", "car cars van taxi suv sedan vehicle vehicles street road parking traffic city", ""),
        "bus": ("bus", "buses", "bus buses vehicle vehicles", ""),
        "train": ("train", "trains", "train trains locomotive subway railway", ""),
        "truck": ("truck", "trucks", "truck trucks vehicle vehicles pickup", ""),
        "boat": ("boat", "boats", "boat boats ship ships canoe kayak kayaks raft sailboat sailboats", ""),
        "plane": ("plane|airplane|jet", "planes|airplanes|jets", "plane planes airplane airplanes jet jets", ""),
        "motorcycle": ("motorcycle", "motorcycles", "motorcycle motorcycles motorbike bike bikes dirtbike", "bicycle"),
        "bicycle": ("bicycle", "bicycles", "bicycle bicycles bike bikes", "motorcycle"),
    },
    "food": {
        "pizza": ("pizza", "pizzas", "pizza pizzas slice slices food", ""),
        "sandwich": ("sandwich", "sandwiches", "sandwich sandwiches burger hamburger food bread", ""),
        "cake": ("cake", "cakes", "cake cakes dessert cupcake cupcakes food pastry", ""),
        "salad": ("salad", "salads", "salad vegetables food veggies", ""),
        "donut": ("donut|doughnut", "donuts|doughnuts", "donut donuts doughnut doughnuts pastry pastries food", ""),
    },
    "toys": {
        "ball": ("ball", "balls", "ball balls football basketball baseball soccer toy toys volleyball tennis", ""),
        "frisbee": ("frisbee", "frisbees", "frisbee frisbees disc disk toy toys", ""),
        "stick": ("stick", "sticks", "stick sticks branch pole log", ""),
        "kite": ("kite", "kites", "kite kites parasail", ""),
    },
    "boards": {
        "skateboard": ("skateboard", "skateboards", "skateboard skateboards board skateboarder skateboarding", ""),
        "surfboard": ("surfboard", "surfboards", "surfboard surfboards board surfer surfing surf", ""),
        "snowboard": ("snowboard", "snowboards", "snowboard snowboards board snowboarder snowboarding", ""),
        "bike": ("bike", "bikes", "bike bikes bicycle bicycles motorcycle motorcycles biker cyclist", ""),
    },
    "sports": {
        "tennis": ("tennis", "", "tennis racket racquet", ""),
        "baseball": ("baseball", "", "baseball batter pitcher bat", ""),
        "soccer": ("soccer", "", "soccer football", ""),
        "basketball": ("basketball", "", "basketball", ""),
        "hockey": ("hockey", "", "hockey", ""),
    },
    "furniture": {
        "bed": ("bed", "beds", "bed beds bedroom hotel", ""),
        "couch": ("couch|sofa", "couches|sofas", "couch couches sofa sofas living futon", ""),
        "bench": ("bench", "benches", "bench benches", ""),
        "toilet": ("toilet", "toilets", "toilet toilets bathroom restroom", ""),
    },
    "clothes": {
        "dress": ("dress", "dresses", "dress dresses gown skirt", ""),
        "jacket": ("jacket", "jackets", "jacket jackets coat coats vest hoodie", ""),
        "swimsuit": ("swimsuit|bikini", "swimsuits|bikinis", "swimsuit swimsuits bikini bikinis suit swimming", ""),
        "uniform": ("uniform", "uniforms", "uniform uniforms player players team", ""),
    },
}
# Name: phrases, words of captions that may mean it.
PLACES = {
    "snow": (
        "in the snow|through the snow|across the snow|on the snow|in snow",
        "snow snowy snowing ski skis skiing skier skiers snowboard snowboarder snowboarding sled slope ice icy winter",
    ),
    "beach": (
        "on the beach|at the beach|on a beach|along the beach|down the beach|in the sand|on the sand|across the beach",
        "beach sand sandy shore ocean surf sea waves wave surfer coast surfboard shoreline desert",
    ),
    "water": (
        "in the water|through the water|in a lake|in the ocean|in a pool|in the pool|in a river|in water|in the lake",
        "water ocean lake river pool pond sea wave waves surf surfer swim swims swimming stream boat wet splash "
        "puddle splashing beach shore kayak canoe creek waterfall fountain diving",
    ),
    "grass": (
        "in the grass|through the grass|on the grass|in a field|across the grass|in the field|on the lawn|in a park|"
        "through a field|on grass|in the yard|across a field|in the park|in a grassy field|in a grassy area",
        "grass grassy field lawn yard backyard park meadow pasture green hill garden outside outdoors soccer baseball",
    ),
    "street": (
        "on the street|in the street|down the street|down a street|on a street|on a road|on the road|down the road|"
        "down a road|on the sidewalk|on a sidewalk|down a city street|on a city street|along a street",
        "street road sidewalk city pavement traffic crosswalk town urban parking car cars bus truck highway alley "
        "intersection curb path outside motorcycle taxi driveway",
    ),
    "woods": (
        "in the woods|through the woods|in a forest|in the forest|through a forest",
        "woods forest trees tree wooded jungle log trail",
    ),
    "kitchen": (
        "in a kitchen|in the kitchen",
        "kitchen stove oven refrigerator fridge counter sink cooking cook chef food microwave",
    ),
    "bathroom": ("in a bathroom|in the bathroom", "bathroom toilet sink shower tub restroom bathtub mirror bath"),
    "bedroom": ("in a bedroom|in the bedroom|on a bed|on the bed", "bedroom bed beds hotel blanket pillow pillows"),
    "living room": (
        "in a living room|in the living room|on a couch|on the couch|on a sofa",
        "living couch sofa room lounge furniture television tv",
    ),
    "restaurant": ("in a restaurant|at a restaurant", "restaurant table food dinner lunch cafe bar eating meal eat"),
    "store": ("in a store|at a store|in a shop", "store shop market shopping display mall"),
}
MOVING = ("through", "across", "down", "along")
ENDS = _words("$ , . with while near by next as during behind holding wearing surrounded under beside after that")
# What a person or a dog has or does that the other does not.
TELLING = _words(
    "wearing wears shirt jacket hat dress holding holds pants jeans shorts coat helmet riding rides suit glasses "
    "sitting sits standing talking uniform bikini arms hands camera guitar collar leash mouth tail tongue muzzle fur "
    "fetch fetches barking barks teeth paws paw ears spotted furry shaggy he she his her him racing race dressed"
)
PRONOUNS = _words("he she his her him hers himself herself beard bearded mustache pregnant shirtless")
# Before these a noun is part of another name.
COMPOUNDS = _words(
    "hot teddy polar stuffed toy rocking tennis soccer beach rubber exercise volley bowling golf fire pick pickup "
    "police race snow street bean straw flower dirt motor speed row cross party hockey glow walking carnival "
    "ballroom wedding day night water ski sheep pan cup prairie crab cable steam parking cheer ginger dump"
)


def _people_group(several: bool) -> tuple[Concept, ...]:
    rows = [
        ("man", ("man", "guy"), ("men", "guys"), MALE, "boy"),
        ("woman", ("woman", "lady"), ("women", "ladies"), FEMALE, "girl"),
        ("boy", ("boy",), ("boys",), MALE, "man"),
        ("girl", ("girl",), ("girls",), FEMALE, "woman"),
    ]
    return tuple(
        Concept(name, plural if several else single, blockers | SEVERAL_PEOPLE, _words(rival))
        for name, single, plural, blockers, rival in rows
    )


def _thing(name: str, forms: list[list[str]], several: bool, blockers: str, near: str) -> Concept:
    return Concept(name, tuple(forms[several]), _words(blockers) | {*forms[0], *forms[1]}, _words(near))


def _groups() -> list[Group]:
    found = []
    colours = tuple(
        Concept(
            name, (name, "grey") if name == "gray" else (name,), _words(f"{name} {same}") | ANY_COLOUR, _words(near)
        )
        for name, (same, near) in COLOURS.items()
    )
    beside = _words("photo photograph picture photos")
    before = _words("and light dark bright")
    found.append(Group("colours", "colour", colours, before, OWN_COLOUR | _words("and , $ or"), None, beside))
    numbers = tuple(
        Concept(name, (name,), _words(f"{name} {same}") | (SEVERAL if name != "two" else _words("one")))
        for name, same in NUMBERS.items()
    )
    parts = (
        "story dimensional way wheeler wheelers wheeled tone piece legged level tier tiered person man $ , other "
        "others of or"
    )
    body = "legs feet wheels hands paws eyes arms ears front hind back and"
    # "One of them ..., the other ..." counts as well.
    beside = _words("one other another both")
    before = _words("number twenty thirty or and")
    found.append(Group("numbers", "count", numbers, before, _words(f"{parts} {body}"), None, beside))
    for several in (False, True):
        mark = " (several)" if several else ""
        people = _people_group(several)
        dark = frozenset(COLOURS)
        found.append(Group("people" + mark, "object", people, dark, not_beside=PRONOUNS))
        beasts = tuple(
            Concept(name, (forms[several],), blockers | SEVERAL_ANIMALS) for name, (*forms, blockers) in BEASTS.items()
        )
        found.append(Group("animals" + mark, "object", beasts, COMPOUNDS))
        # A dog for a person and a person for a dog, but not a person for another one.
        persons = frozenset(one.name for one in people)
        dog = Concept("dog", beasts[0].forms, beasts[0].blockers | ANIMALS)
        subjects = (*(Concept(one.name, one.forms, one.blockers | PEOPLE, persons) for one in people), dog)
        found.append(Group("subjects" + mark, "object", subjects, COMPOUNDS | dark, not_beside=TELLING))
        for name, things in THINGS.items():
            concepts = tuple(
                _thing(thing, [one.split("|") for one in forms], several, blockers, near)
                for thing, (*forms, blockers, near) in things.items()
                if forms[several]
            )
            if concepts:
                found.append(Group(name + mark, "object", concepts, COMPOUNDS))
    near = {"beach": "water", "water": "beach", "woods": "grass", "grass": "woods"}
    for mark, moving in (("", False), (" (moving)", True)):
        # What is on a street is not through a field.
        forms = {
            name: tuple(one for one in phrases.split("|") if moving is (one.split()[0] in MOVING))
            for name, (phrases, _) in PLACES.items()
        }
        places = tuple(
            Concept(name, forms[name], _words(blockers), _words(near.get(name, "")))
            for name, (_, blockers) in PLACES.items()
            if forms[name]
        )
        found.append(Group("places" + mark, "place", places, only_before=ENDS))
    return found


GROUPS = tuple(_groups())
TOKEN = re.compile(r"[\w'-]+|[^\w\s]")
_FORMS = {
    group.name: (
        {form: concept for concept in group.concepts for form in concept.forms},
        re.compile(
            r"(?<![\w'-])("
            + "|".join(sorted((form for one in group.concepts for form in one.forms), key=len, reverse=True))
            + r")(?![\w'-])"
        ),
    )
    for group in GROUPS
}


def words_of(captions: Iterable[str]) -> frozenset[str]:
    """The words of captions in lower case, those with a hyphen also by their parts."""
    tokens = {token for caption in captions for token in TOKEN.findall(caption.lower())}
    return frozenset(tokens | {part for token in tokens for part in token.replace("'s", "").split("-")})


def find_slots(caption: str, kind: str | None = None) -> list[Slot]:
    """The places of a caption whose word or phrase can be exchanged, of one of [`KINDS`] or of all."""
    lowered = caption.lower()
    # There are letters whose small form is longer.
    if len(lowered) != len(caption):
        return []
    words, slots = words_of([caption]), []
    for group in GROUPS:
        if kind not in (None, group.kind) or words & group.not_beside:
            continue
        concepts, pattern = _FORMS[group.name]
        for match in pattern.finditer(lowered):
            before, after = TOKEN.findall(lowered[: match.start()]), TOKEN.findall(lowered[match.end() :])
            left, right = before[-1] if before else "^", after[0] if after else "$"
            left, right = "a" if left == "an" else left, "$" if right == "." else right
            if left in group.not_after or right in group.not_before:
                continue
            if group.only_before is None or right in group.only_before:
                slots.append(Slot(group, concepts[match[1]], match[1], *match.span(), left, right))
    return slots


def excludes(slot: Slot, new: Concept, words: frozenset[str]) -> bool:
    """Whether `new` in the place of `slot` is false of an image whose captions have `words`, as far as words say."""
    old = slot.concept
    apart = new.name != old.name and new.name not in old.rivals and old.name not in new.rivals
    return apart and not words & new.blockers


def put(caption: str, slot: Slot, form: str) -> str:
    """The caption with `form` in a slot, with "a" or "an" before it and a capital where there was one."""
    head, tail = caption[: slot.start], caption[slot.end :]
    if article := re.search(r"(?<![\w'-])([Aa])n?(\s+)$", head):
        vowel = form[0] in "aeio" or form.startswith("umbrella")
        head = f"{head[: article.start()]}{article[1]}{'n' if vowel else ''}{article[2]}"
    if caption[slot.start].isupper() and not head.strip():
        form = form[0].upper() + form[1:]
    return head + form + tail


__all__ = ["GROUPS", "KINDS", "Concept", "Group", "Slot", "excludes", "find_slots", "put", "words_of"]
