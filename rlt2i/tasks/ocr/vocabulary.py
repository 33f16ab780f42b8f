"""Words and scenes of the OCR task, ours: 84 nouns, 60 adjectives, 36 verbs, 12 phrases, 72 scenes."""

from __future__ import annotations

_NOUNS = """
    Anchor Apple Arrow Atlas Bakery Banner Beacon Bicycle Biscuit Bridge Butter Cabin Camera Candle Canyon Carpet Castle
    Cellar Cherry Cinema Circus Clover Coffee Comet Compass Coral Cotton Desert Dragon Eagle Engine Falcon Feather
    Ferry Forest Fountain Galaxy Garden Ginger Hammer Harbor Harvest Helmet Honey Island Jacket Jungle Kettle Ladder
    Lantern Lemon Library Magnet Maple Market Meadow Mirror Museum Orchard Orchid Palace Parade Pepper Piano Pirate
    Planet Pocket Puzzle Rabbit Rocket Saddle Sailor Signal Spirit Studio Summit Sunset Temple Thunder Ticket Tiger
    Tunnel Velvet Window
"""
_ADJECTIVES = """
    Ancient Autumn Better Bitter Blue Bold Brave Bright Calm Clever Cosmic Cozy Crystal Daily Daring Deep Electric
    Endless Fancy Fresh Friendly Gentle Giant Golden Grand Green Happy Hidden Honest Humble Lucky Magic Mellow Midnight
    Modern Mystic Noble Northern Open Orange Perfect Polar Proud Purple Quick Quiet Royal Rustic Secret Silent Silver
    Simple Solar Southern Sunny Swift Tender Urban Vintage Wild
"""
_VERBS = """
    Admire Believe Borrow Bring Build Carry Catch Choose Discover Dream Embrace Enjoy Explore Follow Forgive Gather
    Imagine Invent Keep Learn Listen Mend Open Paint Plant Protect Question Remember Repair Respect Save Share Taste
    Trust Visit Wonder
"""
NOUNS, ADJECTIVES, VERBS = (tuple(words.split()) for words in (_NOUNS, _ADJECTIVES, _VERBS))
FIXED = (
    "Buy {n} Get {m} Free",
    "Closed Until {n} PM",
    "Exit {n}",
    "Gate {n} Boarding",
    "Level {n} Complete",
    "Mile {n}",
    "Open {n} Hours",
    "Platform {n}",
    "Room {n}",
    "Route {n} North",
    "Since 19{n}",
    "Speed Limit {n}",
)
"""Phrases with numbers: {n} is one of 10 to 99, {m} of 1 to 9."""

SCENES = tuple(
    """
    A neon sign above a late night diner that reads "{text}"
    A chalkboard outside a small cafe with "{text}" written in white chalk
    A wooden signpost on a mountain trail, carved with "{text}"
    A birthday cake on a kitchen table with "{text}" in red icing
    A vintage travel poster of a coastline with the title "{text}"
    A street mural on a brick wall that spells "{text}" in bold letters
    A book on a library shelf with "{text}" printed on its spine
    A cinema marquee at dusk announcing "{text}"
    A hot air balloon over green hills with "{text}" on its side
    A coffee mug on an office desk that says "{text}"
    A white T-shirt on a hanger, printed with "{text}"
    A bus stop display in the rain showing "{text}"
    A cardboard box on a doorstep, stamped with "{text}"
    A storefront window with "{text}" painted on the glass in gold
    A robot in a workshop holding a sign that says "{text}"
    A scrabble board with wooden tiles forming "{text}"
    A concert poster pasted on a lamp post, headlined "{text}"
    A snowy park where "{text}" is drawn in the snow
    A computer screen in a dark room displaying "{text}"
    A billboard beside a desert highway that reads "{text}"
    A license plate on an old blue car that reads "{text}"
    A baseball cap embroidered with "{text}"
    A candle jar on a windowsill with the label "{text}"
    A newspaper on a breakfast table with the headline "{text}"
    A spaceship hull with "{text}" painted near its hatch
    A bakery paper bag on a counter, printed with "{text}"
    A lighthouse by the sea with a banner that says "{text}"
    A hiking boot print beside "{text}" written in wet sand
    A classroom blackboard with "{text}" in large letters
    A wine bottle on a rustic table with the label "{text}"
    A stadium scoreboard at night flashing "{text}"
    A skateboard deck with "{text}" in graffiti style
    A tram passing through a city, its front display showing "{text}"
    A museum entrance with "{text}" engraved in stone
    A pillow on a gray sofa, stitched with "{text}"
    A circus tent with a striped banner announcing "{text}"
    A fishing boat in a harbor with the name "{text}" on its bow
    A fortune cookie on a plate with a slip that reads "{text}"
    A greeting card on a wooden desk with "{text}" in elegant script
    A protest march where a woman raises a sign that says "{text}"
    A train station clock with "{text}" on the board below
    A toy store shelf with a box labeled "{text}"
    A garden gate with a metal plate that reads "{text}"
    A rooftop water tower painted with "{text}"
    A pizza box on a picnic blanket, printed with "{text}"
    A vinyl record sleeve with the title "{text}"
    A construction fence with a warning sign that says "{text}"
    A subway wall with tiles that spell "{text}"
    A knight holding a flag with "{text}" on it
    A laptop covered with stickers, the largest of which says "{text}"
    A farm stand with a hand painted board that reads "{text}"
    A submarine control panel with a screen showing "{text}"
    A ballet theater program lying on a red seat, titled "{text}"
    A surfboard leaning on a palm tree with "{text}" along its length
    A pharmacy sign glowing green with the word "{text}"
    A dog wearing a collar with a tag that says "{text}"
    A library card on a desk, stamped "{text}"
    A mountain hut with a wooden board above the door reading "{text}"
    A racing car with "{text}" across its door
    A tea tin on a kitchen shelf with the label "{text}"
    A sailing ship whose main sail shows "{text}"
    A wall calendar open on a page titled "{text}"
    A jar of cookies with a handwritten label "{text}"
    A kite in a clear sky with "{text}" printed on it
    A brass plaque on an oak door that reads "{text}"
    A shopping bag in a mirror selfie, printed with "{text}"
    A game console start screen that shows "{text}"
    A street food cart with a banner that says "{text}"
    A notebook cover on a cafe table with "{text}" in blue ink
    An airplane pulling a banner that reads "{text}" over a beach
    An ice cream truck with "{text}" in colorful letters
    An astronaut on the moon planting a flag that says "{text}"
    """.strip().splitlines()
)
