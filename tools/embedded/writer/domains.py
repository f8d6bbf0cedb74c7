"""What documents are about: one entry per domain, its people, things, acts, aims, qualities and places.

Every verb takes every thing of its domain as an object, so that any draw reads as English.
"""

from __future__ import annotations

from dataclasses import dataclass

_TABLE = """
coaching: coach, mentor, trainer, motivator
 things: goal, habit, routine, milestone, setback, challenge, target, first step, weekly plan, excuse
 acts: track, review, celebrate, reach, strengthen, tackle, reshape, commit to
 aims: confidence, motivation, discipline, progress, focus, self-belief
 qualities: motivational, personal, ambitious, realistic, daily, achievable
 places: in our sessions, on the training ground, at the finish line
kindness: friend, neighbour, stranger, companion
 things: kind word, promise, heart, smile, memory, secret, apology, quiet hour, small favour, open hand
 acts: cherish, forgive, share, treasure, remember, comfort, trust, carry
 aims: love, kindness, gratitude, forgiveness, patience, hope
 qualities: nice, gentle, loyal, tender, honest, lasting
 places: by the fireside, at the open door, across the years
gardening: gardener, florist, grower, landscaper
 things: rose, hedge, lawn, seedling, compost heap, greenhouse, flower bed, shrub, bulb, trellis
 acts: plant, water, prune, weed, trim, mulch, dig up, fertilise
 aims: rich soil, shade, blossom, a long summer, root health
 qualities: leafy, blooming, thorny, evergreen, fragrant, wild
 places: in the garden, behind the shed, along the path
cooking: cook, chef, caterer, food writer
 things: soup, stew, sauce, roast, salad, pancake, casserole, dumpling, omelette, curry
 acts: stir, season, simmer, taste, serve, garnish, reheat, chop up
 aims: flavour, a full table, good appetite, balance of spices, a simple supper
 qualities: spicy, tender, salty, savoury, homemade, peppery
 places: in the kitchen, over a low flame, at the long table
sailing: sailor, captain, skipper, deckhand
 things: mast, anchor, rudder, sail, harbour light, compass, hull, rope ladder, lifeboat, cabin
 acts: hoist, steer, lower, moor, repaint, secure, inspect, haul up
 aims: a fair wind, safe passage, calm water, the open sea, a good bearing
 qualities: seaworthy, nautical, windward, salted, tarred, drifting
 places: on the deck, off the coast, in the harbour
music: musician, violinist, drummer, composer
 things: melody, violin, chorus, drum, piano, chord, ballad, trumpet, concert, rhythm
 acts: tune, rehearse, hum, compose, record, conduct, transcribe, perform
 aims: harmony, tempo, a clear tone, perfect pitch, applause
 qualities: melodic, rhythmic, acoustic, musical, echoing, sharp
 places: in the orchestra pit, on the bandstand, at the concert hall
painting: painter, illustrator, portraitist, art student
 things: canvas, portrait, easel, brush, sketch, mural, palette, watercolour, frame, still life
 acts: paint, sketch, frame, varnish, exhibit, restore, shade, colour
 aims: colour, perspective, soft light, contrast, composition
 qualities: abstract, vivid, painted, crimson, impressionist, textured
 places: in the studio, at the gallery, under the skylight
carpentry: carpenter, joiner, woodworker, cabinet maker
 things: plank, bench, drawer, chisel, bookshelf, table leg, door frame, saw, stool, wooden box
 acts: saw, sand, hammer, glue, polish, measure, assemble, carve
 aims: straight grain, sturdiness, a smooth edge, craftsmanship, fine sawdust
 qualities: oak, wooden, sanded, solid, hollow, varnished
 places: in the workshop, on the workbench, under the stairs
astronomy: astronomer, stargazer, physicist, observer
 things: telescope, comet, planet, galaxy, eclipse, moon, star chart, satellite, meteor, nebula
 acts: observe, chart, photograph, discover, orbit, study, name, predict
 aims: starlight, a dark sky, gravity, the edge of space, deep space
 qualities: lunar, distant, solar, glowing, celestial, cosmic
 places: at the observatory, beyond the moon, above the horizon
farming: farmer, shepherd, dairy worker, herdsman
 things: tractor, barn, field, cow, haystack, fence, plough, flock, orchard, crop
 acts: harvest, fence, herd, milk, rotate, plough, graze, fatten
 aims: a good harvest, fresh milk, dry hay, rain in spring, pasture
 qualities: rural, muddy, grazing, fertile, ripe, grassy
 places: in the barn, across the pasture, at the farm gate
weather: forecaster, meteorologist, weather watcher, storm chaser
 things: storm, cloud, raindrop, snowfall, rainbow, breeze, thunderclap, heatwave, frost, barometer
 acts: forecast, measure, track, announce, outlast, record, await, map
 aims: sunshine, low pressure, humidity, a clear sky, mild air
 qualities: cloudy, stormy, humid, frosty, windy, sunny
 places: over the valley, at the weather station, above the rooftops
travel: traveller, tour guide, tourist, explorer
 things: passport, suitcase, hotel, ticket, island, guidebook, souvenir, landmark, border, itinerary
 acts: visit, book, explore, pack, recommend, photograph, cross, plan
 aims: adventure, distance, a change of air, local colour, lost luggage
 qualities: foreign, scenic, tropical, crowded, coastal, remote
 places: at the airport, on the island, across the border
railway: train driver, conductor, signalman, station master
 things: engine, platform, carriage, signal, tunnel, timetable, track, junction, whistle, freight wagon
 acts: couple, inspect, delay, repair, signal, reroute, board, load
 aims: steam, punctuality, a clear track, the night express, coal
 qualities: express, rattling, northbound, iron, delayed, overnight
 places: at the station, along the line, in the dining car
library: librarian, reader, archivist, bookseller
 things: novel, shelf, catalogue, chapter, dictionary, manuscript, bookmark, atlas, reading lamp, margin
 acts: borrow, shelve, index, catalogue, quote, annotate, bind, return
 aims: silence, knowledge, good print, a quiet corner, old ink
 qualities: printed, dusty, literary, borrowed, leather, rare
 places: in the reading room, between the shelves, at the lending desk
medicine: doctor, nurse, surgeon, pharmacist
 things: patient, bandage, symptom, prescription, fever, clinic, vaccine, wound, stethoscope, diagnosis
 acts: examine, treat, diagnose, monitor, bandage, cure, report, prevent
 aims: recovery, health, rest, a steady pulse, clean air
 qualities: medical, clinical, feverish, sterile, chronic, painful
 places: in the ward, at the clinic, on the night shift
law: lawyer, judge, barrister, clerk
 things: verdict, contract, witness, clause, appeal, statute, courtroom, lawsuit, testimony, settlement
 acts: dispute, cite, draft, overturn, sign, appeal, question, settle
 aims: justice, evidence, precedent, due process, a fair hearing
 qualities: legal, guilty, binding, civil, sworn, criminal
 places: in court, before the bench, at the hearing
money: banker, accountant, investor, treasurer
 things: budget, loan, invoice, ledger, dividend, mortgage, receipt, tax return, savings account, share
 acts: audit, invest, borrow, balance, transfer, withdraw, calculate, repay
 aims: interest, profit, low debt, cash flow, a balanced ledger
 qualities: financial, taxable, costly, annual, fiscal, overdue
 places: at the bank, on the ledger, in the vault
school: teacher, pupil, tutor, headmaster
 things: lesson, essay, blackboard, exam, homework sheet, textbook, classroom, spelling test, satchel, timetable
 acts: grade, explain, memorise, correct, recite, revise, copy, hand in
 aims: grammar, a good mark, arithmetic, attention, a clear example
 qualities: academic, studious, clever, strict, written, advanced
 places: in the classroom, at the blackboard, after school
theatre: actor, director, playwright, stagehand
 things: curtain, script, costume, scene, audience, spotlight, rehearsal, monologue, stage, puppet
 acts: rehearse, direct, act out, applaud, rewrite, stage, memorise, improvise
 aims: drama, comedy, good timing, suspense, a standing ovation
 qualities: dramatic, theatrical, comic, tragic, masked, opening
 places: behind the curtain, on the stage, in the front row
pottery: potter, sculptor, ceramist, glazer
 things: vase, kiln, clay bowl, teapot, glaze, mug, jar, wheel, tile, figurine
 acts: glaze, mould, shape, fire, decorate, throw away, smooth, dry
 aims: soft clay, even heat, a thin wall, symmetry, earthy colour
 qualities: ceramic, glazed, cracked, earthen, porcelain, round
 places: at the kiln, on the potter's wheel, in the drying room
sewing: tailor, seamstress, weaver, dressmaker
 things: needle, button, coat, thread, sleeve, pattern, hem, zip, quilt, collar
 acts: stitch, hem, mend, iron, knit, embroider, patch, unpick
 aims: fine cloth, a good fit, silk, a neat seam, warm wool
 qualities: woollen, silken, striped, tailored, knitted, velvet
 places: at the loom, in the tailor's shop, by the sewing box
fishing: fisherman, angler, fishmonger, boatman
 things: net, hook, trout, fishing rod, bait box, salmon, pier, reel, float, crab pot
 acts: bait, cast out, net, gut, reel in, weigh, release, untangle
 aims: fresh fish, the tide, still water, a good catch, river mud
 qualities: slippery, scaly, tidal, fresh, freshwater, deep
 places: by the river, on the pier, at the weir
birds: birdwatcher, falconer, warden, naturalist
 things: owl, nest, feather, sparrow, robin, heron, egg, birdsong, hawk, wing
 acts: spot, ring, feed, count, identify, shelter, protect, startle
 aims: birdsong, the dawn chorus, migration, marshland, plumage
 qualities: feathered, migrating, nesting, winged, speckled, chirping
 places: in the treetops, at the marsh, above the reeds
mountains: climber, mountaineer, hiker, alpine guide
 things: summit, glacier, ridge, tent, ice axe, boulder, trail, base camp, cliff, avalanche
 acts: climb, scale, cross, camp below, descend, survey, mark, conquer
 aims: thin air, a clear view, firm snow, altitude, safe footing
 qualities: steep, rocky, alpine, icy, snowy, sheer
 places: on the ridge, below the summit, at base camp
computers: programmer, developer, engineer, analyst
 things: program, server, keyboard, database, password, algorithm, bug, network, website, laptop
 acts: debug, install, compile, reboot, encrypt, test, download, refactor
 aims: clean code, memory, bandwidth, security, a working backup
 qualities: digital, wireless, automated, binary, virtual, encrypted
 places: on the server, at the terminal, in the cloud
news: reporter, editor, journalist, columnist
 things: headline, article, interview, newspaper, deadline, column, scoop, printing press, rumour, front page
 acts: publish, edit, print, verify, headline, leak, report, proofread
 aims: accuracy, the truth, public opinion, circulation, a reliable source
 qualities: breaking, editorial, anonymous, scandalous, weekly, exclusive
 places: in the newsroom, on the front page, at the press office
cycling: cyclist, bike courier, mechanic, racer
 things: bicycle, pedal, tyre, helmet, chain, saddle, handlebar, puncture, gear, bell
 acts: pedal, oil, pump up, adjust, race, brake, overtake, fix
 aims: speed, a smooth road, balance, a tailwind, chain oil
 qualities: two-wheeled, rusty, uphill, greasy, tubular, downhill
 places: on the cycle path, down the hill, at the repair stand
bees: beekeeper, honey seller, hive inspector, apiarist
 things: hive, queen bee, swarm, honeycomb, honey jar, smoker, bee, sting, wax candle, drone
 acts: inspect, smoke, swarm, collect, strain, breed, feed, bottle
 aims: honey, pollen, nectar, wax, clover in bloom
 qualities: buzzing, golden, sticky, waxy, swarming, amber
 places: at the hive, among the clover, in the apiary
photography: photographer, film maker, camera operator, model
 things: camera, lens, tripod, negative, darkroom, flash, album, shutter, portrait lens, exposure
 acts: photograph, focus, develop, crop, enlarge, zoom in on, expose, frame
 aims: natural light, sharpness, depth of field, silver film, a fast shutter
 qualities: blurred, panoramic, negative, overexposed, sepia, positive
 places: in the darkroom, behind the camera, at the photo booth
building: architect, builder, mason, surveyor
 things: bridge, tower, brick, foundation, scaffold, blueprint, roof, chimney, pillar, archway
 acts: design, demolish, lay out, reinforce, brick up, survey, construct, plaster
 aims: concrete, steel, firm ground, load, a building permit
 qualities: brick, concrete, towering, structural, Gothic, crumbling
 places: on the building site, under the arch, on the scaffold
market: merchant, shopkeeper, trader, street seller
 things: stall, bargain, basket, price tag, apple crate, spice sack, scale, customer, coin, shop window
 acts: sell, price, wrap, trade, import, weigh, haggle over, stock
 aims: demand, a fair price, fresh fruit, good trade, loose change
 qualities: cheap, wholesale, imported, discounted, seasonal, bargain
 places: at the market, behind the counter, on the square
dance: dancer, choreographer, ballerina, dance partner
 things: waltz, ballet shoe, ballroom, tango, twirl, pose, footstep, recital, mirror, leap
 acts: choreograph, practise, twirl, perform, lead, stretch, partner, bow to
 aims: grace, posture, rhythm in the feet, lightness, applause
 qualities: graceful, swaying, barefoot, balletic, spinning, nimble
 places: in the ballroom, on the dance floor, at the barre
electricity: electrician, technician, lineman, inventor
 things: battery, wire, fuse, switch, magnet, light bulb, socket, circuit, generator, cable
 acts: wire up, charge, insulate, ground, switch off, replace, solder, recharge
 aims: voltage, current, the positive pole, a negative charge, power
 qualities: electric, magnetic, live, positive, negative, charged
 places: in the fuse box, on the power line, at the plant
numbers: mathematician, statistician, calculator, student
 things: equation, fraction, proof, triangle, sum, curve, graph, prime number, theorem, angle
 acts: solve, prove, multiply, divide, plot, subtract, estimate, square
 aims: logic, a positive number, a negative sum, symmetry, infinity
 qualities: positive, negative, equal, even, odd, infinite
 places: on the number line, at the chalkboard, below zero
winter: skier, skater, snow clearer, lodge owner
 things: sledge, icicle, snowman, mitten, scarf, ski lift, frozen pond, fireplace, snowball, hot drink
 acts: shovel, sledge past, melt, ice, warm up, scrape, salt, skate around
 aims: snow, frost, warmth, early dusk, hot chocolate
 qualities: frozen, wintry, snowbound, chilly, white, glazed
 places: on the slope, by the frozen lake, at the ski lodge
detectives: detective, inspector, spy, police officer
 things: clue, fingerprint, alibi, suspect, footprint, motive, magnifying glass, theft, secret code, case file
 acts: solve, investigate, trail, interrogate, decode, photograph, unmask, follow up
 aims: proof, the hidden motive, a confession, suspicion, a lucky break
 qualities: mysterious, suspicious, secret, stolen, forged, hidden
 places: at the crime scene, in the interview room, down the alley
"""


@dataclass(frozen=True, slots=True)
class Domain:
    """One subject and its vocabulary; no tuple is empty."""

    name: str
    people: tuple[str, ...]
    things: tuple[str, ...]
    acts: tuple[str, ...]
    aims: tuple[str, ...]
    qualities: tuple[str, ...]
    places: tuple[str, ...]


def _words(line: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in line.split(":", 1)[1].split(","))


def _parse(table: str) -> tuple[Domain, ...]:
    lines = table.strip().splitlines()
    blocks = [lines[start : start + 6] for start in range(0, len(lines), 6)]
    return tuple(Domain(block[0].split(":")[0], *(_words(line) for line in block)) for block in blocks)


DOMAINS = _parse(_TABLE)
BY_NAME = {domain.name: domain for domain in DOMAINS}
